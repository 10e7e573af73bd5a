"""The table of formats: one row for each shape of data that is read as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from strixft.formats.faults import RowFault, as_text, parse_json, shown
from strixft.formats.keys import Keys, is_empty
from strixft.formats.messages import (
    REASONING,
    Chat,
    Message,
    Row,
    read_message,
    read_messages,
    read_tools,
    with_reasoning,
)
from strixft.support.tables import Table

Kind = Literal["chat", "text", "pairs", "thumbs"]

Columns = frozenset[str]

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns that hold the system message."""

_JSON_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
"""A list of messages as text: in a cell of CSV, or where somebody wrote the list out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of row."""

    name: str
    kind: Kind
    """What is trained: answers, whole text; pairs and thumbs wait for preference training."""
    shapes: tuple[Columns, ...]
    """The columns that make a data set this format; any one of the sets."""
    optional: Columns = frozenset()
    """Columns that are used where they are there."""
    read: Callable[[Keys], Chat]
    """Takes what the format knows of a row."""
    detected: bool = True
    """Whether `format: auto` may choose it; others are chosen by name."""
    example: Row

    @property
    def columns(self) -> Columns:
        """The first of the shapes."""
        return self.shapes[0]

    def to_chat(self, row: Row, ignored: frozenset[str] = frozenset()) -> Chat:
        """Return what a row says.

        Args:
            row: With its columns under our names.
            ignored: Keys that are left out, wherever in the row they stand.

        Raises:
            RowFault: It is not of this format, or says something that is not read.
        """
        keys = Keys(row, "the row", ignored)
        chat = self.read(keys)
        keys.finish_row(is_text=self.kind == "text")
        return replace(chat, unused=frozenset(keys.unused))


def is_thumb(label: object) -> bool:
    """Return whether a label says that an answer is good, or that it is not.

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


def _messages(row: Keys, column: str) -> Chat:
    return _chat(row, read_messages(row.take(column), column, row))


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
    if not isinstance(turns, list):
        raise RowFault("bad_history", f"'history' is no list of pairs: {shown(turns)}")
    for turn in turns:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowFault("bad_history", f"'history' is no list of pairs: {shown(turn)}")
        messages += [_user(turn[0], "a turn of 'history'"), _answer(turn[1], "history")]
    return messages


def _alpaca(row: Keys) -> Chat:
    asked = _instruction(row.take("instruction"), row)
    answer = _answer(row.take("output"), "output", row.take(*REASONING))
    return _chat(row, [*_history(row), asked, answer])


def _question_answer(row: Keys) -> Chat:
    asked = _user(row.take("question"), "'question'")
    answer = _answer(row.take("answer"), "answer", row.take(*REASONING))
    return _chat(row, [*_history(row), asked, answer])


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
    """Return what stands before the two answers of a pair, under any of its usual names."""
    for column in ("conversations", "messages"):
        if not is_empty(value := row.take(column)):
            return read_messages(value, column, row)
    for column in ("prompt", "question"):
        if not is_empty(value := row.take(column)):
            return [*_history(row), *_prompt(value, column, row)]
    asked = row.take("instruction")
    return [] if is_empty(asked) else [*_history(row), _instruction(asked, row)]


def _sides(row: Keys, *columns: str) -> list[list[Message]]:
    """Return the chats that end with the answers in these columns."""
    sides = {column: _reply(row.take(column), column, row) for column in columns}
    answers = [one for one, side in sides.items() if side[0]["role"] not in ("system", "user")]
    before = _before(row) if answers else []
    if answers and not before:
        raise RowFault("no_prompt", f"has {answers[0]!r}, and no prompt before it")
    return [[*before, *side] if one in answers else side for one, side in sides.items()]


def _pair(row: Keys) -> Chat:
    chosen, rejected = _sides(row, "chosen", "rejected")
    if chosen == rejected:
        raise RowFault("same_answers", "chosen and rejected are the same")
    system = row.take(*SYSTEM)
    return Chat(
        _with_system(system, chosen),
        _tools(row, [*chosen, *rejected]),
        rejected=_with_system(system, rejected),
    )


def _chosen(row: Keys) -> Chat:
    (messages,) = _sides(row, "chosen")
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
"""Fault of a row that the chosen format leaves out on purpose; it is no bad row."""


def _columns(*names: str) -> Columns:
    return frozenset(names)


_PING: list[Any] = [
    {"role": "user", "content": "Ping nas."},
    {"role": "assistant", "content": '{"command": "ping", "host": "nas"}'},
]

_PAIR: Row = {"prompt": "Ping nas.", "chosen": '{"command": "ping"}', "rejected": "What is a nas?"}

_BESIDE = _columns("system", "tools")

_BEFORE = _BESIDE | _columns(
    *("prompt", "conversations", "messages", "question", "instruction", "input", "history")
)

_PAIRS = tuple(
    _columns(*before, "chosen", "rejected")
    for before in ((), ("prompt",), ("conversations",), ("messages",), ("question",))
)

_THUMBS = (
    _columns("messages", "label"),
    _columns("conversations", "label"),
    _columns("prompt", "completion", "label"),
)


FORMATS: Table[Format] = Table(
    "format",
    Format(
        name="messages",
        kind="chat",
        shapes=(_columns("messages"),),
        optional=_BESIDE,
        read=lambda row: _messages(row, "messages"),
        example={"messages": _PING},
    ),
    Format(
        name="sharegpt",
        kind="chat",
        shapes=(_columns("conversations"),),
        optional=_BESIDE,
        read=lambda row: _messages(row, "conversations"),
        example={
            "conversations": [
                {"from": "human", "value": "Ping nas."},
                {"from": "gpt", "value": '{"command": "ping", "host": "nas"}'},
            ]
        },
    ),
    Format(
        name="alpaca",
        kind="chat",
        shapes=(_columns("instruction", "output"),),
        optional=_columns("input", "history") | _BESIDE,
        read=_alpaca,
        example={"instruction": "Ping it.", "input": "nas", "output": '{"command": "ping"}'},
    ),
    Format(
        name="prompt-completion",
        kind="chat",
        shapes=(_columns("prompt", "completion"),),
        optional=_columns("history") | _BESIDE,
        read=_prompt_completion,
        example={"prompt": "Ping nas.", "completion": '{"command": "ping", "host": "nas"}'},
    ),
    Format(
        name="question-answer",
        kind="chat",
        shapes=(_columns("question", "answer"),),
        optional=_columns("history") | _BESIDE,
        read=_question_answer,
        example={"question": "What does ping do?", "answer": "It asks whether a host is there."},
    ),
    Format(
        name="text",
        kind="text",
        shapes=(_columns("text"),),
        read=_text,
        example={"text": "A nas keeps files for the whole network."},
    ),
    Format(
        name="preference",
        kind="pairs",
        shapes=_PAIRS,
        optional=_BEFORE,
        read=_pair,
        example=_PAIR,
    ),
    Format(
        name="thumbs",
        kind="thumbs",
        shapes=_THUMBS,
        optional=_BESIDE,
        read=_thumbs,
        example={"messages": _PING, "label": True},
    ),
    Format(
        name="chosen",
        kind="chat",
        shapes=(_columns("chosen"),),
        optional=_BEFORE,
        read=_chosen,
        detected=False,
        example=_PAIR,
    ),
    Format(
        name="thumbs-up",
        kind="chat",
        shapes=_THUMBS,
        optional=_BESIDE,
        read=_thumbs_up,
        detected=False,
        example={"messages": _PING, "label": True},
    ),
)
