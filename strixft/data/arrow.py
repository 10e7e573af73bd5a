"""Rows of Arrow tables, as they were before Arrow gave all of them the same keys.

Arrow keeps mappings as structs: every row gets the keys of all rows, null where it had none. In
Parquet and in Arrow files a null in a struct looks like a key that is not there, so it is left out.
Nulls in lists, in maps and in JSON text were written by the author.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from strixft.data.streams import (
    ARROW,
    MAX_RATIO,
    MAX_ROW_BYTES,
    RATIO_COUNTS_FROM,
    RawRow,
    too_large,
)
from strixft.formats.faults import RowFault, parse_json, shown
from strixft.formats.messages import DataRow
from strixft.formats.sources import SourceFile
from strixft.support.errors import DataError

Change = Callable[[Any], Any]
"""Turns a value of an Arrow type into JSON's."""

ROWS_AT_ONCE = 64


def _change(kind: pa.DataType) -> Change | None:
    """Return the change that values of a type need; None where they are JSON's already."""
    if isinstance(kind, pa.JsonType):  # how `datasets` keeps values of several types
        return lambda value: parse_json(value, "not_json", "a value")
    if pa.types.is_struct(kind):
        inner = {field.name: change for field in kind if (change := _change(field.type))}
        return lambda value: {
            name: inner[name](one) if name in inner else one
            for name, one in value.items()
            if one is not None
        }
    if not hasattr(kind, "item_type") and not hasattr(kind, "value_type"):
        return None
    is_map = pa.types.is_map(kind)  # others are lists of every kind, and dictionaries
    each = _change(kind.item_type if is_map else kind.value_type)

    def changed(one: Any) -> Any:
        return one if one is None or each is None else each(one)

    def mapping(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        made = {key: changed(one) for key, one in pairs}
        if len(made) < len(pairs):
            raise RowFault("not_json", f"has a map with a key twice: {shown(pairs)}")
        return made

    if is_map:
        return mapping
    return each and (lambda value: list(map(changed, value)))


def _rows(table: Any, changes: dict[str, Change]) -> Iterator[DataRow | RowFault]:
    try:
        fault = too_large()
        if table.nbytes <= MAX_ROW_BYTES:
            rows = table.to_pylist()
            for row in rows:
                for name, change in changes.items():
                    if row[name] is not None:
                        row[name] = change(row[name])
            yield from rows
            return
    except UnicodeDecodeError:
        fault = RowFault("not_utf8", "is not UTF-8 text")
    except RowFault as one:
        fault = one
    if table.num_rows == 1:
        yield fault
        return
    for index in range(table.num_rows):  # the fault is one row's
        yield from _rows(table.slice(index, 1), changes)


def rows_of(tables: Iterable[Any], schema: pa.Schema, name: str) -> Iterator[RawRow]:
    """Yield the rows of tables or batches, numbered from 1.

    Raises:
        DataError: Two columns share a name, and only one of them would be read.
    """
    twice = next((column for column in schema.names if schema.names.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"{name} has the column {twice!r} twice", fix="give each column its own name"
        )
    changes = {field.name: change for field in schema if (change := _change(field.type))}
    number = 0
    for table in tables:
        for row in _rows(table, changes):
            number += 1
            yield RawRow(number, row, table.nbytes // table.num_rows)


def read_parquet(file: SourceFile) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: It unpacks to far more than its size.
    """
    with pq.ParquetFile(file.path) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        unpacked = sum(group.total_byte_size for group in groups)
        if unpacked > max(RATIO_COUNTS_FROM, MAX_RATIO * file.path.stat().st_size):
            raise DataError(
                f"{file.name} unpacks to more than {MAX_RATIO} times its size, as a bomb does",
                fix="look at it; save it with less compression if it is what it should be",
            )
        batches = parquet.iter_batches(ROWS_AT_ONCE, use_threads=False)
        yield from rows_of(batches, parquet.schema_arrow, file.name)


def read_arrow(file: SourceFile) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file, as `datasets` saves them."""
    with pa.memory_map(str(file.path)) as source:
        is_file = source.read(len(ARROW)) == ARROW
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        every = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        batches = (
            batch.slice(start, ROWS_AT_ONCE)
            for batch in every
            for start in range(0, batch.num_rows, ROWS_AT_ONCE)
        )
        yield from rows_of(batches, reader.schema, file.name)
