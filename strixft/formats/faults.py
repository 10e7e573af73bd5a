"""Read a row so that nothing disappears unnoticed: faults, values, and keys of mappings."""

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
    """Return a value from data in the form for a message: escaped and cut.

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
    """Return the value if it is text that can be written as UTF-8.

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
    raise ValueError(f"{name} is not a JSON value")


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
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return made


DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_number, object_pairs_hook=_object
)
"""Refuses what Python's own decoder changes silently: keys that appear twice, NaN, infinity."""


def parse_json(text: str, kind: str, what: str) -> Any:
    """Return the value of JSON text inside a row.

    Raises:
        RowFault: It is not JSON.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(kind, f"{what} is not JSON ({error}): {shown(text)}") from None


MOST_LEVELS = 64
"""Mappings and lists in one another."""


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
            raise RowFault(kind, f"{what} is {value}, which is not a JSON value")
    elif value is not None and not isinstance(value, int):
        raise RowFault(
            kind,
            f"{what} is a {type(value).__name__}, which is not a JSON value; save it as text:"
            f" {shown(value)}",
        )


METADATA = frozenset(
    {
        *("annotations", "author", "cache_control", "country", "created", "date", "finish_reason"),
        *("hash", "id", "index", "lang", "language", "logprobs", "model", "rank", "score"),
        *("signature", "source", "state", "time", "timestamp", "usage", "uuid"),
    }
)
"""Keys of messages, parts and calls that no chat template shows."""

CHANGES = frozenset({"partial", "prefix"})
"""Flags that change what a template writes."""

MEDIA = frozenset({"audio", "audios", "image", "images", "video", "videos"})
"""Columns of what is not text, as LLaMA-Factory, TRL and ms-swift name them."""

SHOWN = MEDIA | {
    *("available_tools", "chat_template_kwargs", "choices", "context", "contexts", "documents"),
    *("functions", "history", "options", "passage", "passages", "reasoning", "reasoning_content"),
    *("system", "system_message", "system_prompt", "thinking", "tool_defs", "tools"),
}
"""Columns that belong to what a model is shown; other columns describe the row."""


def is_empty(value: object) -> bool:
    """Check that a value says nothing: no text, not yes, and nothing in it that says anything.

    >>> is_empty(" "), is_empty({"a": [None]}), is_empty(False), is_empty({"a": False})
    (True, True, True, False)
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, Mapping)):
        inner = value.values() if isinstance(value, Mapping) else value
        return all(one is not False and is_empty(one) for one in inner)
    return value is None or value is False


class Keys:
    """The keys of a row, or of a mapping in it, that nothing has read yet.

    Args:
        value: The mapping. A key without a value is the same as no key.
        what: Its name in texts: `message 2`.
        ignored: Keys that the recipe leaves out, at any depth.
        unused: Gets the keys that are not read.
    """

    __slots__ = ("_ignored", "_left", "unused", "what")

    def __init__(
        self,
        value: Mapping[str, Any],
        what: str,
        ignored: frozenset[str] = frozenset(),
        unused: set[str] | None = None,
    ) -> None:
        self._left = {k: v for k, v in value.items() if v is not None and k not in ignored}
        self._ignored = ignored
        self.what = what
        self.unused: set[str] = set() if unused is None else unused
        """Keys that describe the row, and say nothing to a model."""

    def inside(self, value: Mapping[str, Any], what: str) -> Keys:
        """Return the keys of a mapping inside this one."""
        return Keys(value, what, self._ignored, self.unused)

    def take(self, *names: str) -> Any:
        """Return the value of a key that has several names, None if it has none.

        Raises:
            RowFault: Two of the names have different values.
        """
        left = self._left
        if left.keys().isdisjoint(names):
            return None
        found = {name: left.pop(name) for name in names if name in left}
        if len(found) == 1:
            return next(iter(found.values()))
        filled = {name: value for name, value in found.items() if not is_empty(value)} or found
        (first, value), *others = filled.items()
        for name, other in others:
            if other != value:
                raise RowFault(
                    "two_values",
                    f"{self.what} has {first!r} and {name!r}, which differ:"
                    f" {shown(value)}, {shown(other)}",
                    name,
                )
        return value

    @property
    def all_read(self) -> bool:
        """No key is left."""
        return not self._left

    def finish(self, kind: str) -> None:
        """Refuse what is left and could be shown to a model; note the rest in `unused`.

        Args:
            kind: `row`, `text` (a row of plain text, which holds all that its author wanted to be
                seen), `message`, `part` or `call`.

        Raises:
            RowFault: A column belongs to what a model is shown; or a key inside the row holds text,
                a list or a mapping, and is not metadata.
        """
        is_row = kind in ("row", "text")
        for name, value in self._left.items():
            if is_empty(value):
                continue
            if is_row and name in MEDIA:
                raise RowFault(
                    "media", f"has {name!r}, and only text is trained: {shown(value)}", name
                )
            describes = name in METADATA or name.endswith(("_id", "_at", "_time", "_timestamp"))
            says = isinstance(value, (str, list, Mapping)) and not describes
            if kind == "row" and name in SHOWN:
                problem = f"has {name!r}, which its format does not read: {shown(value)}"
                raise RowFault("unknown_key", problem, name)
            if not is_row and (says or name in CHANGES):
                problem = f"{self.what} has {shown(name)}, which is not read: {shown(value)}"
                raise RowFault("unknown_key", problem, name)
            label = name if name.isprintable() and len(name) <= 60 else shown(name)
            self.unused.add(label if is_row else f"{kind}.{label}")
