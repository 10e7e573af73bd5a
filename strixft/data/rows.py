"""Token rows on disk: one Arrow file, written in batches, memory-mapped when read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from strixft.data.encode import TokenRow

SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "row": pa.int64(),
        "part": pa.int32(),
        "content": pa.uint64(),
        "question": pa.uint64(),
        "group": pa.uint64(),
        "length": pa.int32(),
        "num_trained": pa.int32(),
        "prompt_tokens": pa.int32(),
        "request": pa.string(),
        "answer": pa.string(),
        "label": pa.bool_(),
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "rejected_input_ids": pa.list_(pa.int32()),
        "rejected_trained": pa.list_(pa.bool_()),
    }
)

COUNTS = ("file", "row", "content", "question", "group", "length", "num_trained")
"""Columns of numbers, which fit into memory for any data set."""


def _lists(arrays: Sequence[npt.NDArray[Any] | None], kind: pa.DataType) -> pa.Array:
    """Return arrays as a list column, in one piece."""
    known = [array if array is not None else np.zeros(0, np.int32) for array in arrays]
    offsets = np.zeros(len(known) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in known], out=offsets[1:])
    values = pa.array(np.concatenate(known), type=kind)
    missing = [array is None for array in arrays]
    mask = pa.array(missing) if any(missing) else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def batch_of(rows: Sequence[TokenRow]) -> pa.RecordBatch:
    """Return token rows as a piece of a row file."""
    columns: dict[str, Any] = {
        "length": [len(row) for row in rows],
        "num_trained": [np.count_nonzero(row.trained) for row in rows],
    }
    for name, kind in (("input_ids", pa.int32()), ("trained", pa.bool_())):
        columns[name] = _lists([getattr(row, name) for row in rows], kind)
        rejected = [getattr(row.rejected, name, None) for row in rows]
        columns[f"rejected_{name}"] = _lists(rejected, kind)
    for name in set(SCHEMA.names) - columns.keys():
        columns[name] = [getattr(row, name) for row in rows]
    return pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


class RowWriter(contextlib.ExitStack):
    """Writes token rows to an Arrow file, batch by batch.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        file = self.enter_context(pa.OSFile(str(path), "wb"))
        self._writer = self.enter_context(pa.ipc.new_stream(file, SCHEMA))
        self.num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows, as `batch_of` makes them."""
        self._writer.write_batch(batch)
        self.num_rows += batch.num_rows


def read_counts(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of numbers of a row file; the texts and tokens stay on disk.

    `chat` is added: a running number of the source rows, of which each may have become several.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all().select(COUNTS)
        counts = {name: table[name].to_numpy().copy() for name in COUNTS}
    places = np.stack([counts["file"].astype(np.int64), counts["row"]])
    changes = (places[:, 1:] != places[:, :-1]).any(axis=0)
    counts["chat"] = np.concatenate([np.zeros(min(1, len(places[0])), np.int64), changes.cumsum()])
    return counts


@dataclass(frozen=True)
class TokenRows:
    """Token rows of a prepared data set, split into training and validation."""

    train: Dataset
    validation: Dataset

    @classmethod
    def load(
        cls, path: Path, train: npt.NDArray[np.int64], validation: npt.NDArray[np.int64]
    ) -> TokenRows:
        """Return rows of a file by their indices; an index may appear more than once."""
        rows = Dataset.from_file(str(path))
        return cls(rows.select(train), rows.select(validation))
