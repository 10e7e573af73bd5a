"""Which format a row has, and which mapping would give it one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping

from strixft.formats.messages import Row
from strixft.formats.table import FORMATS, SYSTEM, Columns, Format, is_thumb

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


def _full(form: Format, columns: Columns, used: Columns) -> list[Columns]:
    """The shapes of a format that these columns fill, and that leave no mapping unused."""
    return [s for s in form.shapes if s <= columns and used <= s | form.optional]


def fitting(row: Row, used: Columns = frozenset()) -> list[Format]:
    """The formats that a row may have; one that needs more columns hides those that need fewer.

    Args:
        row: With its columns named as ours. A column without a value is none.
        used: Columns that the recipe maps; the format must use them all.
    """
    columns = frozenset(name for name, value in row.items() if value is not None)
    if "label" in columns and not is_thumb(row["label"]):
        columns -= {"label"}
    return list(_fitting(columns, used))


@functools.lru_cache(maxsize=256)
def _fitting(columns: Columns, used: Columns) -> tuple[Format, ...]:
    shapes = {
        form.name: full
        for form in FORMATS.values()
        if form.detected and (full := _full(form, columns, used))
    }
    every = [shape for full in shapes.values() for shape in full]
    return tuple(
        FORMATS[name]
        for name, full in shapes.items()
        if any(not any(shape < other for other in every) for shape in full)
    )


def _paths(value: object, path: str = "", depth: int = 0) -> Iterator[str]:
    """Dotted paths of a row: columns, and what lies in them (of a list, its first entry)."""
    if path:
        yield path
    if depth >= 3:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list) and value and not isinstance(value[0], str):
        yield from _paths(value[0], f"{path}.0", depth + 1)


def _leaves(paths: list[str]) -> dict[str, str]:
    return {path.rpartition(".")[2].lower(): path for path in reversed(paths)}


def _named(column: str, paths: list[str]) -> str | None:
    """Return the path that ends with a column's name, or with a word that means the same."""
    leaves = _leaves(paths)
    names = (column, *SYNONYMS.get(column, ()))
    return next((leaves[name] for name in names if name in leaves), None)


def _source_of(column: str, paths: list[str]) -> str | None:
    leaves = _leaves(paths)
    near = difflib.get_close_matches(column, leaves, n=1, cutoff=0.8)
    return _named(column, paths) or (leaves[near[0]] if near else None)


def suggest_columns(row: Row) -> dict[str, str] | None:
    """A mapping under which a row that fits no format would fit one; None if none is near.

    >>> suggest_columns({"task": "Ping nas.", "runs": [{"output": "ok"}]})
    {'instruction': 'task', 'output': 'runs.0.output'}
    """
    paths = list(_paths(row))
    best: dict[str, str] = {}
    for form in FORMATS.values():
        required = sorted(form.columns)
        found = {name: path for name in required if (path := _source_of(name, paths))}
        if len(found) < len(required) or len(set(found.values())) < len(required):
            continue
        extra = {name: path for name in sorted(form.optional) if (path := _named(name, paths))}
        if form.detected and len(found) > len(best):
            best = {**found, **{k: v for k, v in extra.items() if v not in found.values()}}
    return best or None
