"""The table of formats: one row for each shape of data that is read as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from strixft.formats.faults import Keys, RowFault, as_text, is_empty, parse_json, shown
from strixft.formats.messages import (
    REASONING,
    Chat,
    DataRow,
    Message,
    read_message,
    read_messages,
    read_tools,
    with_reasoning,
)
from strixft.support.tables import Table

FormatKind = Literal["chat", "text", "pairs", "thumbs"]
Columns = frozenset[str]

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns that hold the system message."""

_JSON_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
"""A list of messages as text, such as in a cell of CSV."""


@dataclass(frozen=True, slots=True)
class Format:
    """One shape of row."""

    name: str
    kind: FormatKind
    """`chat` trains answers, `text` all of it; pairs and thumbs wait for preference training."""
    read: Callable[[Keys], Chat]
    """Takes what the format knows of a row."""
    shapes: tuple[Columns, ...]
    """The columns that make a data set this format; any one of the sets."""
    optional: Columns
    """Columns that are used where they are there."""
    example: DataRow
    detected: bool = True
    """`format: auto` may choose it; others are chosen by name."""

    @property
    def columns(self) -> Columns:
        """The first of the shapes."""
        return self.shapes[0]

    def to_chat(self, row: DataRow, ignored: frozenset[str] = frozenset()) -> Chat:
        """Return the chat that a row holds.

        Args:
            row: With its columns under our names.
            ignored: Keys that are left out, at any depth.

        Raises:
            RowFault: It is not of this format, or says something that is not read.
        """
        keys = Keys(row, "the row", ignored)
        chat = self.read(keys)
        keys.finish_row(is_text=self.kind == "text")
        return replace(chat, unused=frozenset(keys.unused))


def is_thumb(label: object) -> bool:
    """Check that a label says that an answer is good, or that it is not.

    >>> is_thumb(True), is_thumb(0), is_thumb("false"), is_thumb("science"), is_thumb(2)
    (True, True, True, False, False)
    """
    return str(label).lower() in ("true", "false", "1", "0")


def _with_system(system: object, messages: list[Message]) -> list[Message]:
    if is_empty(system):
        return messages
    first = {"role": "system", "content": as_text(system, "'system'")}
    if not messages or messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"].strip() != first["content"].strip():
        raise RowFault(
            "two_values",
            f"has 'system' and a system message, which differ: {shown(system)},"
            f" {shown(messages[0]['content'])}",
            "system",
        )
    return messages


def _tools(row: Keys, messages: list[Message]) -> list[dict[str, Any]] | None:
    """Return the functions that the row, or a message of it, names."""
    said = [read_tools(row.take("tools")), read_tools(row.take("functions"))]
    said += [message.pop("tools", None) for message in messages]
    found = [tools for tools in said if tools]
    if any(tools != found[0] for tools in found):
        raise RowFault("two_values", "has tools in two places, which differ")
    return found[0] if found else None


def _chat(row: Keys, messages: list[Message]) -> Chat:
    return Chat(_with_system(row.take(*SYSTEM), messages), _tools(row, messages))


def _chats(column: str) -> Callable[[Keys], Chat]:
    return lambda row: _chat(row, read_messages(row.take(column), column, row))


def _answer(value: object, column: str, reasoning: object = None) -> Message:
    content = as_text(value, f"{column!r}")
    if not is_empty(reasoning):
        content = with_reasoning(content, as_text(reasoning, "the reasoning"), f"{column!r}")
    return {"role": "assistant", "content": content}


def _user(value: object, what: str) -> Message:
    return {"role": "user", "content": as_text(value, what)}


def _instruction(value: object, row: Keys) -> Message:
    text, more = as_text(value, "'instruction'"), row.take("input")
    parts = [text] if is_empty(more) else [text, as_text(more, "'input'")]
    return _user("\n\n".join(filter(str.strip, parts)), "'instruction'")


def _history(row: Keys) -> list[Message]:
    messages: list[Message] = []
    turns = row.take("history") or []
    if isinstance(turns, str):
        turns = parse_json(turns, "bad_history", "'history'") if turns.strip() else []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowFault("bad_history", f"'history' is not a list of pairs: {shown(turn)}")
        messages += [_user(turn[0], "a turn of 'history'"), _answer(turn[1], "history")]
    return messages


def _exchange(row: Keys, asked: Message, column: str) -> Chat:
    answer = _answer(row.take(column), column, row.take(*REASONING))
    return _chat(row, [*_history(row), asked, answer])


def _alpaca(row: Keys) -> Chat:
    return _exchange(row, _instruction(row.take("instruction"), row), "output")


def _question_answer(row: Keys) -> Chat:
    return _exchange(row, _user(row.take("question"), "'question'"), "answer")


def _is_list(value: object) -> bool:
    if isinstance(value, str):
        return _JSON_MESSAGES.match(value) is not None
    return isinstance(value, list)


def _prompt(value: object, column: str, row: Keys) -> list[Message]:
    return read_messages(value, column, row) if _is_list(value) else [_user(value, f"{column!r}")]


def _reply(value: object, column: str, row: Keys) -> list[Message]:
    if _is_list(value):
        return read_messages(value, column, row)
    if isinstance(value, Mapping):
        return [read_message(value, 1, row)]
    return [_answer(value, column)]


def _prompt_completion(row: Keys) -> Chat:
    asked = _prompt(row.take("prompt"), "prompt", row)
    value = row.take("completion")
    if isinstance(value, str) and not _is_list(value):
        answer = [_answer(value, "completion", row.take(*REASONING))]
    else:
        answer = _reply(value, "completion", row)
    return _chat(row, [*_history(row), *asked, *answer])


def _text(row: Keys) -> Chat:
    text = as_text(row.take("text"), "'text'")
    if not text.strip():
        raise RowFault("empty_turn", "'text' is empty")
    return Chat([], text=text)


def _before(row: Keys) -> list[Message]:
    """Return the messages before the two answers of a pair, under any of their usual names."""
    for column in ("conversations", "messages"):
        if not is_empty(value := row.take(column)):
            return read_messages(value, column, row)
    for column in ("prompt", "question"):
        if not is_empty(value := row.take(column)):
            return [*_history(row), *_prompt(value, column, row)]
    asked = row.take("instruction")
    return [] if is_empty(asked) else [*_history(row), _instruction(asked, row)]


def _ending(row: Keys, *columns: str) -> list[list[Message]]:
    """Return the chats that end with the answers in these columns."""
    said = {column: _reply(row.take(column), column, row) for column in columns}
    answers = [one for one, turns in said.items() if turns[0]["role"] not in ("system", "user")]
    before = _before(row) if answers else []
    if answers and not before:
        raise RowFault("no_prompt", f"has {answers[0]!r}, and no prompt before it")
    return [[*before, *turns] if one in answers else turns for one, turns in said.items()]


def _pair(row: Keys) -> Chat:
    chosen, rejected = _ending(row, "chosen", "rejected")
    if chosen == rejected:
        raise RowFault("same_answers", "chosen and rejected are the same")
    system = row.take(*SYSTEM)
    return Chat(
        _with_system(system, chosen),
        _tools(row, [*chosen, *rejected]),
        rejected=_with_system(system, rejected),
    )


def _chosen(row: Keys) -> Chat:
    (messages,) = _ending(row, "chosen")
    return _chat(row, messages)


def _label(row: Keys) -> bool:
    label = row.take("label")
    if not is_thumb(label):
        raise RowFault("bad_label", f"'label' should be true or false, it is {shown(label)}")
    return str(label).lower() in ("1", "true")


def _labelled(row: Keys) -> Chat:
    for column in ("messages", "conversations"):
        if not is_empty(value := row.take(column)):
            return _chat(row, read_messages(value, column, row))
    return _prompt_completion(row)


def _thumbs(row: Keys) -> Chat:
    return replace(_labelled(row), label=_label(row))


def _thumbs_up(row: Keys) -> Chat:
    if not _label(row):
        raise RowFault(NOT_WANTED, "has a thumbs-down")
    return _labelled(row)


NOT_WANTED = "not_wanted"
"""Fault of a row that the chosen format leaves out on purpose; it is not a bad row."""


def _sets(*columns: str) -> tuple[Columns, ...]:
    return tuple(frozenset(names.split()) for names in columns)


_BESIDE, _WITH_HISTORY, _WITH_INPUT, _BEFORE = _sets(
    "system tools",
    "system tools history",
    "system tools history input",
    "system tools history input prompt conversations messages question instruction",
)

_PAIRS = _sets(
    "chosen rejected",
    "prompt chosen rejected",
    "conversations chosen rejected",
    "messages chosen rejected",
    "question chosen rejected",
)

_THUMBS = _sets("messages label", "conversations label", "prompt completion label")
_ANSWER = '{"command": "ping", "host": "nas"}'
_MESSAGES = {
    "messages": [
        {"role": "user", "content": "Ping nas."},
        {"role": "assistant", "content": _ANSWER},
    ]
}
_TURNS = {
    "conversations": [
        {"from": "human", "value": "Ping nas."},
        {"from": "gpt", "value": _ANSWER},
    ]
}
_TASK = {"instruction": "Ping it.", "input": "nas", "output": '{"command": "ping"}'}
_PROMPT = {"prompt": "Ping nas.", "completion": _ANSWER}
_QUESTION = {
    "question": "What does ping do?",
    "answer": "It asks whether a host is there.",
}
_PLAIN = {"text": "A nas keeps files for the whole network."}
_PAIR = {
    "prompt": "Ping nas.",
    "chosen": '{"command": "ping"}',
    "rejected": "What is a nas?",
}
_THUMB = {**_MESSAGES, "label": True}


FORMATS: Table[Format] = Table(
    "format",
    Format("messages", "chat", _chats("messages"), _sets("messages"), _BESIDE, _MESSAGES),
    Format("sharegpt", "chat", _chats("conversations"), _sets("conversations"), _BESIDE, _TURNS),
    Format("alpaca", "chat", _alpaca, _sets("instruction output"), _WITH_INPUT, _TASK),
    Format(
        *("prompt-completion", "chat", _prompt_completion),
        *(_sets("prompt completion"), _WITH_HISTORY, _PROMPT),
    ),
    Format(
        *("question-answer", "chat", _question_answer),
        *(_sets("question answer"), _WITH_HISTORY, _QUESTION),
    ),
    Format("text", "text", _text, _sets("text"), frozenset(), _PLAIN),
    Format("preference", "pairs", _pair, _PAIRS, _BEFORE, _PAIR),
    Format("thumbs", "thumbs", _thumbs, _THUMBS, _BESIDE, _THUMB),
    Format("chosen", "chat", _chosen, _sets("chosen"), _BEFORE, _PAIR, detected=False),
    Format("thumbs-up", "chat", _thumbs_up, _THUMBS, _BESIDE, _THUMB, detected=False),
)
