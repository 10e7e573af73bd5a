"""`FORMATS`: what a row of a data set looks like, and how it becomes a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strixft.tables import Table

Message = dict[str, Any]
Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of the OpenAI chat format, which chat templates are written for."""


class RowFault(Exception):
    """One row is not what its format says. The caller knows the file and the row.

    Args:
        kind: A short name that rows of the same fault share, such as `unknown_role`.
        problem: What is wrong in this row.
    """

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of row."""

    name: str
    columns: frozenset[str]
    """The columns that make a data set this format."""
    to_messages: Callable[[Row], list[Message]]
    """Turns a row into messages, or raises `RowFault`."""
    example: Row


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _text(value: object, column: str) -> str:
    if value is None:
        raise RowFault("no_text", f"{column} is missing or null")
    if not isinstance(value, str):
        raise RowFault(
            "not_text", f"{column} should be text, it is {type(value).__name__}: {_shown(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows it, tokenizers do not
        raise RowFault(
            "not_unicode", f"{column} has half a character at place {error.start}: {error.reason}"
        ) from None
    return value


def _message(message: object, number: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RowFault("bad_message", f"message {number} has no 'role': {_shown(message)}")
    if message["role"] not in ROLES:
        raise RowFault(
            "unknown_role",
            f"message {number} has the role {_shown(message['role'])};"
            f" known are {', '.join(ROLES)}",
        )
    content = _text(message.get("content"), f"content of message {number}")
    return {"role": message["role"], "content": content}


def _chat(row: Row) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowFault("no_messages", "the row has no 'messages' list, or an empty one")
    return [_message(message, number) for number, message in enumerate(messages, start=1)]


def _prompt_completion(row: Row) -> list[Message]:
    return [
        {"role": "user", "content": _text(row.get("prompt"), "'prompt'")},
        {"role": "assistant", "content": _text(row.get("completion"), "'completion'")},
    ]


FORMATS: Table[Format] = Table(
    "format",
    Format(
        name="messages",
        columns=frozenset({"messages"}),
        to_messages=_chat,
        example={
            "messages": [
                {"role": "user", "content": "Ping nas."},
                {"role": "assistant", "content": '{"command": "ping", "host": "nas"}'},
            ]
        },
    ),
    Format(
        name="prompt-completion",
        columns=frozenset({"prompt", "completion"}),
        to_messages=_prompt_completion,
        example={"prompt": "Ping nas.", "completion": '{"command": "ping", "host": "nas"}'},
    ),
)


def detect_format(columns: frozenset[str]) -> Format | None:
    """The first format whose columns are all there; None if no format fits."""
    return next((row for row in FORMATS.values() if row.columns <= columns), None)
