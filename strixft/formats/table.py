"""The table of formats: one row for each shape of data that is read as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from strixft.formats.messages import (
    Chat,
    Message,
    Row,
    RowFault,
    as_text,
    read_message,
    read_messages,
    read_tools,
    shown,
)
from strixft.tables import Table

Kind = Literal["chat", "text", "pairs", "thumbs"]
Columns = frozenset[str]


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
    to_chat: Callable[[Row], Chat]
    """Turns a row into a chat, or raises `RowFault`."""
    sign: Callable[[Row], bool] = lambda row: True
    """What a row must show besides the columns to be taken for this format."""
    detected: bool = True
    """Whether `format: auto` may choose it; others are chosen by name."""
    example: Row

    @property
    def columns(self) -> Columns:
        """The first of the shapes."""
        return self.shapes[0]


def _system(row: Row) -> list[Message]:
    system = row.get("system")
    return [{"role": "system", "content": as_text(system, "'system'")}] if system else []


def _answer(value: object, what: str) -> Message:
    return {"role": "assistant", "content": as_text(value, what)}


def _user(value: object, what: str) -> Message:
    return {"role": "user", "content": as_text(value, what)}


def _chat(row: Row, column: str) -> Chat:
    return Chat(_system(row) + read_messages(row.get(column), column), read_tools(row.get("tools")))


def _instruction(row: Row) -> Message:
    text = as_text(row.get("instruction"), "'instruction'")
    more = row.get("input")
    return _user(f"{text}\n\n{as_text(more, repr('input'))}" if more else text, "'instruction'")


def _history(row: Row) -> list[Message]:
    messages: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowFault("bad_history", f"'history' is no list of pairs: {shown(turn)}")
        messages += [_user(turn[0], "a turn of 'history'"), _answer(turn[1], "'history'")]
    return messages


def _alpaca(row: Row) -> Chat:
    answer = _answer(row.get("output"), "'output'")
    return Chat([*_system(row), *_history(row), _instruction(row), answer])


def _prompt(value: object, column: str) -> list[Message]:
    if isinstance(value, list):
        return read_messages(value, column)
    return [_user(value, f"{column!r}")]


def _reply(value: object, column: str) -> list[Message]:
    if isinstance(value, list):
        return read_messages(value, column)
    if isinstance(value, Mapping):
        return [read_message(value, 1)]
    return [_answer(value, f"{column!r}")]


def _prompt_completion(row: Row) -> Chat:
    messages = _prompt(row.get("prompt"), "prompt") + _reply(row.get("completion"), "completion")
    return Chat(_system(row) + messages, read_tools(row.get("tools")))


def _question_answer(row: Row) -> Chat:
    question = _user(row.get("question"), "'question'")
    return Chat([*_system(row), question, _answer(row.get("answer"), "'answer'")])


def _text(row: Row) -> Chat:
    text = as_text(row.get("text"), "'text'")
    if not text.strip():
        raise RowFault("empty_turn", "'text' is empty")
    return Chat([], text=text)


def _before(row: Row) -> list[Message]:
    """What stands before the two answers of a pair, under any of its usual names."""
    for column in ("conversations", "messages"):
        if row.get(column):
            return read_messages(row[column], column)
    for column in ("prompt", "question"):
        if row.get(column):
            return _prompt(row[column], column)
    return [_instruction(row)] if row.get("instruction") else []


def _side(row: Row, column: str) -> list[Message]:
    reply = _reply(row.get(column), column)
    if reply[0]["role"] in ("system", "user"):  # the whole chat stands there
        return reply
    before = _before(row)
    if not before:
        raise RowFault("no_prompt", f"has {column!r}, and no prompt before it")
    return _system(row) + before + reply


def _pair(row: Row) -> Chat:
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if chosen == rejected:
        raise RowFault("same_answers", "chosen and rejected are the same")
    return Chat(chosen, read_tools(row.get("tools")), rejected=rejected)


def _chosen(row: Row) -> Chat:
    return Chat(_side(row, "chosen"), read_tools(row.get("tools")))


def _label(row: Row) -> bool:
    label = row.get("label")
    if label not in (0, 1):
        raise RowFault("bad_label", f"'label' should be true or false, it is {shown(label)}")
    return bool(label)


def _labelled(row: Row) -> Chat:
    if row.get("completion") is not None:
        return _prompt_completion(row)
    return _chat(row, "messages" if row.get("messages") is not None else "conversations")


def _thumbs(row: Row) -> Chat:
    chat = _labelled(row)
    return Chat(chat.messages, chat.tools, label=_label(row))


def _thumbs_up(row: Row) -> Chat:
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
_BEFORE = _columns(
    "prompt", "conversations", "messages", "question", "instruction", "input", "system", "tools"
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
        optional=_columns("tools", "system"),
        to_chat=lambda row: _chat(row, "messages"),
        example={"messages": _PING},
    ),
    Format(
        name="sharegpt",
        kind="chat",
        shapes=(_columns("conversations"),),
        optional=_columns("tools", "system"),
        to_chat=lambda row: _chat(row, "conversations"),
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
        optional=_columns("input", "system", "history"),
        to_chat=_alpaca,
        example={"instruction": "Ping it.", "input": "nas", "output": '{"command": "ping"}'},
    ),
    Format(
        name="prompt-completion",
        kind="chat",
        shapes=(_columns("prompt", "completion"),),
        optional=_columns("system", "tools"),
        to_chat=_prompt_completion,
        example={"prompt": "Ping nas.", "completion": '{"command": "ping", "host": "nas"}'},
    ),
    Format(
        name="question-answer",
        kind="chat",
        shapes=(_columns("question", "answer"),),
        optional=_columns("system"),
        to_chat=_question_answer,
        example={"question": "What does ping do?", "answer": "It asks whether a host is there."},
    ),
    Format(
        name="text",
        kind="text",
        shapes=(_columns("text"),),
        to_chat=_text,
        example={"text": "A nas keeps files for the whole network."},
    ),
    Format(
        name="preference",
        kind="pairs",
        shapes=_PAIRS,
        optional=_BEFORE,
        to_chat=_pair,
        example=_PAIR,
    ),
    Format(
        name="thumbs",
        kind="thumbs",
        shapes=_THUMBS,
        optional=_columns("tools", "system"),
        to_chat=_thumbs,
        sign=lambda row: isinstance(row.get("label"), bool),
        example={"messages": _PING, "label": True},
    ),
    Format(
        name="chosen",
        kind="chat",
        shapes=(_columns("chosen"),),
        optional=_BEFORE,
        to_chat=_chosen,
        detected=False,
        example=_PAIR,
    ),
    Format(
        name="thumbs-up",
        kind="chat",
        shapes=_THUMBS,
        optional=_columns("tools", "system"),
        to_chat=_thumbs_up,
        detected=False,
        example={"messages": _PING, "label": True},
    ),
)
