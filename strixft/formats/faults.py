"""The fault of a row, and values from data as JSON and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn


class RowFault(Exception):
    """One row is not what its format says. The caller knows the file and the row.

    Args:
        kind: A short name that rows of the same fault share, such as `unknown_role`.
        problem: What is wrong in this row.
        key: The key without which the row could be used.
    """

    def __init__(self, kind: str, problem: str, key: str | None = None) -> None:
        super().__init__(problem)
        self.kind = kind
        self.problem = problem
        self.key = key

    def __reduce__(self) -> tuple[type[RowFault], tuple[str, str, str | None]]:
        return RowFault, (self.kind, self.problem, self.key)


def shown(value: object, length: int = 60) -> str:
    """A value from data as it may stand in a message: escaped and cut.

    >>> shown("a" * 99, 8), shown({"a": 1})
    ("'aaaaaaa…", "{'a': 1}")
    """
    try:
        text = repr(value[:length] if isinstance(value, str) else value)
    except RecursionError:
        return f"{type(value).__name__} (nested too deeply to show)"
    whole = len(text) <= length and not (isinstance(value, str) and len(value) > length)
    return text if whole else f"{text[:length]}…"


def as_text(value: object, what: str) -> str:
    """The value, if it is text that can be written as UTF-8.

    Raises:
        RowFault: It is missing or something else.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # JSON allows it, tokenizers do not
                raise RowFault(
                    "not_unicode",
                    f"{what} has half a character at place {error.start}: {error.reason}",
                ) from None
        return value
    if value is None:
        raise RowFault("no_text", f"{what} is missing or null")
    raise RowFault(
        "not_text", f"{what} should be text, it is {type(value).__name__}: {shown(value)}"
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_number, object_pairs_hook=_object
)
"""Refuses what Python's own decoder changes silently: keys that stand twice, NaN, infinity."""


def parse_json(text: str, kind: str, what: str) -> Any:
    """JSON that stands as text inside a row.

    Raises:
        RowFault: It is not JSON.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(kind, f"{what} is not JSON ({error}): {shown(text)}") from None


MOST_LEVELS = 64
"""Of mappings and lists in one another."""


def check_json(value: object, kind: str, what: str, level: int = 0) -> None:
    """Refuse a value that JSON has no form for, such as a date that Arrow made of text.

    Raises:
        RowFault: It, or something in it, is such a value.
    """
    if isinstance(value, str):
        as_text(value, what)
    elif isinstance(value, (Mapping, list)):
        if level > MOST_LEVELS:
            raise RowFault(kind, f"{what[:200]} is nested more than {MOST_LEVELS} levels deep")
        named = value.items() if isinstance(value, Mapping) else ((None, one) for one in value)
        for name, inner in named:
            part = what if name is None else f"{what}.{as_text(name, f'a key of {what}')}"
            check_json(inner, kind, part, level + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RowFault(kind, f"{what} is {value}, which is no JSON value")
    elif value is not None and not isinstance(value, int):
        raise RowFault(
            kind,
            f"{what} is a {type(value).__name__}, which is no JSON value; save it as text:"
            f" {shown(value)}",
        )
