"""Read a mapping key by key, so that no key disappears without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strixft.formats.faults import RowFault, shown

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
"""Columns with what is not text, as LLaMA-Factory, TRL and ms-swift name them."""

SHOWN = MEDIA | {
    *("available_tools", "chat_template_kwargs", "choices", "context", "contexts", "documents"),
    *("functions", "history", "options", "passage", "passages", "reasoning", "reasoning_content"),
    *("system", "system_message", "system_prompt", "thinking", "tool_defs", "tools"),
}
"""Columns that belong to what a model is shown; other columns describe the row."""


def is_empty(value: object) -> bool:
    """Return whether a value says nothing: no text, not yes, and nothing in it that says anything.

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
        what: What it is, for texts: `message 2`.
        ignored: Keys that the recipe leaves out, wherever they stand.
        unused: Where to note keys that are not read.
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
        """Return the keys of a mapping that stands in this one."""
        return Keys(value, what, self._ignored, self.unused)

    def take(self, *names: str) -> Any:
        """Return the value of a key that has several names, None if it has none.

        Raises:
            RowFault: Two of the names say different things.
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
            kind: Of the mapping: `message`, `part` or `call`.

        Raises:
            RowFault: A key holds text, a list or a mapping, and is no metadata.
        """
        for name, value in self._left.items():
            if is_empty(value):
                continue
            says = isinstance(value, (str, list, Mapping)) and not _is_metadata(name)
            if says or name in CHANGES:
                raise RowFault(
                    "unknown_key",
                    f"{self.what} has {shown(name)}, which is not read: {shown(value)}",
                    name,
                )
            self.unused.add(f"{kind}.{_label(name)}")

    def finish_row(self, *, is_text: bool) -> None:
        """Refuse columns that the format should read; note the others in `unused`.

        Args:
            is_text: The row is plain text, which holds what its author wanted to be seen.

        Raises:
            RowFault: A column belongs to what a model is shown.
        """
        for name, value in self._left.items():
            if is_empty(value):
                continue
            if name in MEDIA:
                raise RowFault(
                    "media", f"has {name!r}, and only text is trained: {shown(value)}", name
                )
            if name in SHOWN and not is_text:
                raise RowFault(
                    "unknown_key",
                    f"has {name!r}, which its format does not read: {shown(value)}",
                    name,
                )
            self.unused.add(_label(name))


def _label(name: str) -> str:
    """Return a key as it may be shown."""
    return name if name.isprintable() and len(name) <= 60 else shown(name)


def _is_metadata(name: str) -> bool:
    return name in METADATA or name.endswith(("_id", "_at", "_time", "_timestamp"))
