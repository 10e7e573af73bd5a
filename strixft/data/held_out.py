"""Fixed rows in micro-batches no larger than those of training, for losses between updates.

So their forward pass needs no memory and no compiled kernels that training does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from strixft.data.batches import Batch, PackedRows, Packing, RowShape, collate, on_device

MOST_ROWS = 2000
"""Most rows of such a set: more would hardly make its mean loss more certain."""

MicroBatch = list[list[int]]
"""Indices of the documents of each row."""


@dataclass(frozen=True, slots=True)
class _Room:
    """Tells what fits into the largest micro-batch of training."""

    shape: RowShape
    lengths: Sequence[int]
    trained: Sequence[int]

    def fits(self, rows: MicroBatch) -> bool:
        shape = self.shape
        tokens = [sum(self.lengths[document] for document in row) for row in rows]
        trained = sum(self.trained[document] for row in rows for document in row)
        if len(rows) > shape.rows or max(tokens) > shape.length or trained > shape.trained:
            return False
        if (packed := shape.packed) is None:
            return all(len(row) == 1 for row in rows)
        if any(self.lengths[document] > packed.longest for row in rows for document in row):
            return False
        padding = [len(packed.padding(shape.length - count)) for count in tokens]
        empty = (shape.rows - len(rows)) * len(packed.empty_row())
        return sum(map(len, rows)) + sum(padding) + empty <= packed.documents


def micro_batches(
    lengths: Sequence[int], trained: Sequence[int], shape: RowShape
) -> list[MicroBatch]:
    """Put rows into micro-batches, in a random order that is always the same.

    Args:
        lengths: Tokens of each row.
        trained: Trained tokens of each row.
        shape: The largest micro-batch of the training. Rows that no such one holds are left out.
    """
    room = _Room(shape, lengths, trained)
    order = np.random.default_rng(0).permutation(len(lengths))[:MOST_ROWS]
    found: list[MicroBatch] = []
    for index in order.tolist():
        last = found[-1] if found else []
        ways = [[*last[:-1], [*last[-1], index]], [*last, [index]]] if last else []
        if (larger := next(filter(room.fits, ways), None)) is not None:
            found[-1] = larger
        elif room.fits([[index]]):
            found.append([[index]])
    return found


class FixedBatches:
    """Micro-batches of rows, made anew each time they are gone through.

    Args:
        rows: A data set with `input_ids` and `trained`.
        chosen: Its rows in micro-batches.
        shape: Of the training's micro-batches.
        device: The device that they are put on.
    """

    def __init__(
        self, rows: Any, chosen: Sequence[MicroBatch], shape: RowShape, device: str
    ) -> None:
        self._packed, self._device = shape.packed, device
        self._counts = [len(batch) for batch in chosen]
        groups = [row for batch in chosen for row in batch]
        flat = np.array([document for row in groups for document in row], dtype=np.int64)
        starts = np.cumsum([0, *map(len, groups)])
        self._rows = PackedRows(rows, Packing(flat, starts, shape.length))
        self.num_rows = len(flat)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for count in self._counts:
            rows = self._rows.take(range(start, start + count))
            start += count
            if self._packed is None:
                rows = [{name: row[name] for name in ("input_ids", "trained")} for row in rows]
            yield on_device(collate(rows, self._packed), self._device)
