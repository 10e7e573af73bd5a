"""Rows of Arrow tables, as they were before Arrow gave all of them the same keys.

Arrow keeps mappings as structs: every row gets the keys of all rows, null where it had none. In
Parquet and in Arrow files a null in a struct cannot be told from a key that is not there, so it is
left out. Nulls in lists, in maps and in JSON text are what somebody wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from strixft.data.streams import MAX_ROW_BYTES, too_large
from strixft.formats.faults import RowFault, parse_json, shown
from strixft.formats.messages import Row
from strixft.support.errors import DataError

Change = Callable[[Any], Any]


def _change(kind: pa.DataType) -> Change | None:
    """Return what turns a value of an Arrow type into what JSON would hold; None: it is that."""
    if isinstance(kind, pa.JsonType):  # how `datasets` keeps values of several types
        return lambda value: parse_json(value, "not_json", "a value")
    if pa.types.is_struct(kind):
        inner = {field.name: change for field in kind if (change := _change(field.type))}
        return lambda value: {
            name: inner[name](one) if name in inner else one
            for name, one in value.items()
            if one is not None
        }
    if pa.types.is_map(kind):
        return partial(_mapping, _change(kind.item_type))
    if hasattr(kind, "value_type"):  # lists of every kind, and dictionaries
        each = _change(kind.value_type)
        return each and (lambda value: [one if one is None else each(one) for one in value])
    return None


def _mapping(change: Change | None, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return an Arrow map, of which `to_pylist` makes pairs."""
    made = {key: one if one is None or change is None else change(one) for key, one in pairs}
    if len(made) < len(pairs):
        raise RowFault("not_json", f"has a map with a key twice: {shown(pairs)}")
    return made


def _rows(table: Any, changes: dict[str, Change]) -> Iterator[Row]:
    for row in table.to_pylist():
        for name, change in changes.items():
            if row[name] is not None:
                row[name] = change(row[name])
        yield row


def rows_of(table: Any, changes: dict[str, Change]) -> Iterator[Row | RowFault]:
    """The rows of a table or a batch; a fault for each that cannot be read.

    Args:
        table: A `pyarrow.Table` or `pyarrow.RecordBatch`.
        changes: What `changes_of` gave for its schema.
    """
    try:
        if table.nbytes <= MAX_ROW_BYTES:
            yield from list(_rows(table, changes))
            return
    except (UnicodeDecodeError, RowFault):
        pass  # one row of them; find it below
    for index in range(table.num_rows):
        row = table.slice(index, 1)
        try:
            yield from _rows(row, changes) if row.nbytes <= MAX_ROW_BYTES else [too_large()]
        except UnicodeDecodeError:
            yield RowFault("not_utf8", "is not UTF-8 text")
        except RowFault as fault:
            yield fault


def changes_of(schema: pa.Schema, name: str) -> dict[str, Change]:
    """What `rows_of` changes in the columns of a table.

    Args:
        schema: Of the table.
        name: Of the file, for the error.

    Raises:
        DataError: Two columns share a name, and only one of them would be read.
    """
    twice = next((column for column in schema.names if schema.names.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"{name} has the column {twice!r} twice", fix="give each column its own name"
        )
    changes = {field.name: _change(field.type) for field in schema}
    return {column: change for column, change in changes.items() if change is not None}
