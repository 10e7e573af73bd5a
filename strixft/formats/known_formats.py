"""`FORMATS`: one row for each shape of data that is read as it is; how a shape is found, and read.

A row of a data set asks something in one column, as text or as messages, and answers it in another,
or its messages hold the answer too.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from strixft.formats.faults import Keys, RowFault, as_text, is_empty, parse_json, shown
from strixft.formats.messages import (
    REASONING,
    TOOLS,
    Chat,
    DataRow,
    Message,
    channels_apart,
    read_message,
    read_messages,
    read_template_kwargs,
    read_tools,
    with_reasoning,
)
from strixft.support.tables import Table

FormatKind = Literal["chat", "text", "pairs", "thumbs"]
Columns = frozenset[str]

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns that hold the system message."""

MESSAGES = ("messages", "conversations")
"""Columns that hold a chat."""

ASKED = (*reversed(MESSAGES), "prompt", "question", "instruction")
"""Columns before the two answers of a pair; the first that is filled counts."""

NOT_WANTED = "not_wanted"
"""Fault of a row that the chosen format leaves out on purpose; it is not a bad row."""

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
        keys.finish("text" if self.kind == "text" else "row")
        return replace(chat, unused=frozenset(keys.unused))


# Read.


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


def _chat(row: Keys, messages: list[Message], rejected: list[Message] | None = None) -> Chat:
    """Return a chat with the row's system message and variables, and the tools that are named."""
    said = [read_tools(row.take(name)) for name in TOOLS]
    said += [message.pop("tools", None) for message in [*messages, *(rejected or [])]]
    found = [tools for tools in said if tools]
    if any(tools != found[0] for tools in found):
        raise RowFault("two_values", "has tools in two places, which differ")
    system = row.take(*SYSTEM)
    other = None if rejected is None else _with_system(system, rejected)
    return Chat(
        _with_system(system, messages),
        found[0] if found else None,
        rejected=other,
        template_kwargs=read_template_kwargs(row),
    )


def _user(value: object, what: str) -> Message:
    return {"role": "user", "content": as_text(value, what)}


def _answer(value: object, column: str, reasoning: object = None) -> Message:
    content = channels_apart(as_text(value, f"{column!r}"), f"{column!r}")
    if not is_empty(reasoning):
        content = with_reasoning(content, as_text(reasoning, "the reasoning"), f"{column!r}")
    return {"role": "assistant", "content": content}


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


def _is_list(value: object) -> bool:
    if isinstance(value, str):
        return _JSON_MESSAGES.match(value) is not None
    return isinstance(value, list)


def _asked(row: Keys, column: str, value: object, *, plain: bool = False) -> list[Message]:
    """Return the messages that a column asks with, and those of the row's history before them.

    Args:
        row: The row.
        column: A column of `ASKED`.
        value: Its value.
        plain: Text alone is read, not a list of messages.
    """
    if column in MESSAGES:
        return read_messages(value, column, row)
    if column == "instruction":
        text, more = as_text(value, "'instruction'"), row.take("input")
        parts = [text] if is_empty(more) else [text, as_text(more, "'input'")]
        asked = [_user("\n\n".join(filter(str.strip, parts)), "'instruction'")]
    elif not plain and _is_list(value):
        asked = read_messages(value, column, row)
    else:
        asked = [_user(value, f"{column!r}")]
    return [*_history(row), *asked]


def _chats(column: str) -> Callable[[Keys], Chat]:
    """Return the reader of a column with a whole chat."""
    return lambda row: _chat(row, read_messages(row.take(column), column, row))


def _exchange(asked: str, column: str, *, plain: bool = True) -> Callable[[Keys], Chat]:
    """Return the reader of a column that asks and one that answers.

    Args:
        asked: Column with the question.
        column: Column with the answer.
        plain: They hold text alone, not lists of messages.
    """

    def read(row: Keys) -> Chat:
        before, value = _asked(row, asked, row.take(asked), plain=plain), row.take(column)
        if plain or (isinstance(value, str) and not _is_list(value)):
            return _chat(row, [*before, _answer(value, column, row.take(*REASONING))])
        return _chat(row, [*before, *_reply(value, column, row)])

    return read


def _reply(value: object, column: str, row: Keys) -> list[Message]:
    if _is_list(value):
        return read_messages(value, column, row)
    return [read_message(value, 1, row) if isinstance(value, Mapping) else _answer(value, column)]


def _ending(*columns: str) -> Callable[[Keys], Chat]:
    """Return the reader of answers, each with the whole chat or behind the same question."""

    def read(row: Keys) -> Chat:
        said = {column: _reply(row.take(column), column, row) for column in columns}
        answers = [one for one, turns in said.items() if turns[0]["role"] not in ("system", "user")]
        if answers:
            filled = ((name, value) for name in ASKED if not is_empty(value := row.take(name)))
            name, value = next(filled, ("", None))
            if not name:
                raise RowFault("no_prompt", f"has {answers[0]!r}, and no prompt before it")
            before = _asked(row, name, value)
            said |= {one: [*before, *said[one]] for one in answers}
        chosen, *others = said.values()
        if chosen in others:
            raise RowFault("same_answers", "chosen and rejected are the same")
        return _chat(row, chosen, *others)

    return read


_prompt_completion = _exchange("prompt", "completion", plain=False)


def _text(row: Keys) -> Chat:
    text = as_text(row.take("text"), "'text'")
    if not text.strip():
        raise RowFault("empty_turn", "'text' is empty")
    return Chat([], text=text)


def _thumbs(*, good_only: bool = False) -> Callable[[Keys], Chat]:
    """Return the reader of labelled chats; of good ones alone it forgets the label."""

    def read(row: Keys) -> Chat:
        label = row.take("label")
        if not is_thumb(label):
            raise RowFault("bad_label", f"'label' should be true or false, it is {shown(label)}")
        good = str(label).lower() in ("1", "true")
        if good_only and not good:
            raise RowFault(NOT_WANTED, "has a thumbs-down")
        for column in MESSAGES:
            if not is_empty(value := row.take(column)):
                chat = _chat(row, read_messages(value, column, row))
                break
        else:
            chat = _prompt_completion(row)
        return chat if good_only else replace(chat, label=good)

    return read


# The table.


def _format(
    name: str,
    kind: FormatKind,
    read: Callable[[Keys], Chat],
    shapes: Sequence[str],
    example: DataRow,
    more: str = "",
    *,
    detected: bool = True,
) -> Format:
    sets = tuple(frozenset(columns.split()) for columns in shapes)
    every = ("system", "tools", "chat_template_kwargs", *more.split())
    beside = frozenset(() if kind == "text" else every)
    return Format(name, kind, read, sets, beside, example, detected)


_ANSWER = '{"command": "ping", "host": "nas"}'
_ASK, _REPLY = ({"role": "user", "content": "Ping nas."}, {"role": "assistant", "content": _ANSWER})
_MESSAGES = {"messages": [_ASK, _REPLY]}
_TURNS = [{"from": "human", "value": "Ping nas."}, {"from": "gpt", "value": _ANSWER}]
_TASK = {"instruction": "Ping it.", "input": "nas", "output": '{"command": "ping"}'}
_PROMPT = {"prompt": "Ping nas.", "completion": _ANSWER}
_QUESTION = {"question": "What does ping do?", "answer": "It asks whether a host is there."}
_PLAIN = {"text": "A nas keeps files for the whole network."}
_PAIR = {"prompt": "Ping nas.", "chosen": '{"command": "ping"}', "rejected": "What is a nas?"}
_THUMB = {**_MESSAGES, "label": True}

_PAIRS = ("chosen rejected", *(f"{column} chosen rejected" for column in ASKED))
_LABELLED = ("messages label", "conversations label", "prompt completion label")
_ANY = " ".join(("history", "input", *ASKED))
_alpaca, _question = _exchange("instruction", "output"), _exchange("question", "answer")

FORMATS: Table[Format] = Table(
    "format",
    _format("messages", "chat", _chats("messages"), ["messages"], _MESSAGES),
    _format(
        "sharegpt", "chat", _chats("conversations"), ["conversations"], {"conversations": _TURNS}
    ),
    _format("alpaca", "chat", _alpaca, ["instruction output"], _TASK, "history input"),
    _format(
        "prompt-completion", "chat", _prompt_completion, ["prompt completion"], _PROMPT, "history"
    ),
    _format("question-answer", "chat", _question, ["question answer"], _QUESTION, "history"),
    _format("text", "text", _text, ["text"], _PLAIN),
    _format("preference", "pairs", _ending("chosen", "rejected"), _PAIRS, _PAIR, _ANY),
    _format("thumbs", "thumbs", _thumbs(), _LABELLED, _THUMB),
    _format("chosen", "chat", _ending("chosen"), ["chosen"], _PAIR, _ANY, detected=False),
    _format("thumbs-up", "chat", _thumbs(good_only=True), _LABELLED, _THUMB, detected=False),
)


# Find.

SYNONYMS = {
    "messages": ("dialog", "dialogue", "chat", "conversation", "turns"),
    "instruction": ("task", "query"),
    "input": ("context",),
    "output": ("response", "target", "result"),
    "prompt": ("input", "query", "request", "user", "human", "source"),
    "completion": ("response", "output", "reply", "target", "assistant", "answer"),
    "question": ("query", "problem"),
    "answer": ("response", "solution"),
    "text": ("content", "body", "document"),
    "chosen": ("preferred", "accepted"),
    "system": SYSTEM,
}
"""Words that other data sets use for our columns."""


def fitting(row: DataRow, used: Columns = frozenset()) -> list[Format]:
    """Return the formats that a row may have; one with more columns hides those with fewer.

    Args:
        row: With its columns named as ours. A column without a value does not count.
        used: Columns that the recipe maps; the format must use them all.
    """
    columns = frozenset(name for name, value in row.items() if value is not None)
    if "label" in columns and not is_thumb(row["label"]):
        columns -= {"label"}
    return [FORMATS[name] for name in _fitting(columns, used)]


@functools.lru_cache(maxsize=256)
def _fitting(columns: Columns, used: Columns) -> tuple[str, ...]:
    filled = [
        (form, shape)
        for form in FORMATS.values()
        for shape in form.shapes
        if form.detected and shape <= columns and used <= shape | form.optional
    ]
    largest = [form for form, shape in filled if not any(shape < other for _, other in filled)]
    return tuple(dict.fromkeys(form.name for form in largest))


def _paths(value: object, path: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the dotted paths of a row: columns, and what they hold (of a list, its first entry)."""
    if path:
        yield path
    if depth >= 3:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list) and value and not isinstance(value[0], str):
        yield from _paths(value[0], f"{path}.0", depth + 1)


def suggest_columns(row: DataRow) -> dict[str, str] | None:
    """Return a mapping under which a row would fit a format; None if none is near.

    >>> suggest_columns({"task": "Ping nas.", "runs": [{"output": "ok"}]})
    {'instruction': 'task', 'output': 'runs.0.output'}
    """
    leaves = {path.rpartition(".")[2].lower(): path for path in reversed(list(_paths(row)))}

    def path_of(column: str, *, near: bool) -> str | None:
        """Return the path that ends with a column's name, a synonym, or a word spelled alike."""
        names = [column, *SYNONYMS.get(column, ())]
        names += difflib.get_close_matches(column, leaves, n=1, cutoff=0.8) if near else []
        return next((leaves[name] for name in names if name in leaves), None)

    best: dict[str, str] = {}
    for form in FORMATS.values():
        found = {name: path_of(name, near=True) for name in sorted(form.columns)}
        used = {path for path in found.values() if path is not None}
        if form.detected and len(used) == len(found) > len(best):
            extra = {name: path_of(name, near=False) for name in sorted(form.optional)}
            found |= {name: path for name, path in extra.items() if path not in used}
            best = {name: path for name, path in found.items() if path is not None}
    return best or None
