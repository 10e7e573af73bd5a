"""Find the format of a row, or a mapping that would give it one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping

from strixft.formats.messages import DataRow
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


def _path_of(column: str, paths: list[str], *, near: bool) -> str | None:
    """Return the path that ends with a column's name, or with a word that means the same.

    Args:
        column: One of ours.
        paths: Of a row.
        near: A word that is spelled much the same will do.
    """
    leaves = {path.rpartition(".")[2].lower(): path for path in reversed(paths)}
    names = [column, *SYNONYMS.get(column, ())]
    if near:
        names += difflib.get_close_matches(column, leaves, n=1, cutoff=0.8)
    return next((leaves[name] for name in names if name in leaves), None)


def suggest_columns(row: DataRow) -> dict[str, str] | None:
    """Return a mapping under which a row would fit a format; None if none is near.

    >>> suggest_columns({"task": "Ping nas.", "runs": [{"output": "ok"}]})
    {'instruction': 'task', 'output': 'runs.0.output'}
    """
    paths = list(_paths(row))
    best: dict[str, str] = {}
    for form in FORMATS.values():
        found = {name: _path_of(name, paths, near=True) for name in sorted(form.columns)}
        used = {path for path in found.values() if path is not None}
        if form.detected and len(used) == len(found) > len(best):
            extra = {name: _path_of(name, paths, near=False) for name in sorted(form.optional)}
            found |= {name: path for name, path in extra.items() if path not in used}
            best = {name: path for name, path in found.items() if path is not None}
    return best or None
