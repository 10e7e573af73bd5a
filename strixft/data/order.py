"""The order in which rows are trained, known before training begins."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from strixft.data.pack import length_groups


def rows_of_epochs(num_rows: int, epochs: float) -> int:
    """Return the rows that a run trains: each once an epoch; a fraction of one stops early."""
    return max(1, round(num_rows * epochs))


def training_order(
    sizes: Sequence[int], num_rows: int, seed: int, rows: int = 1, *, padded: bool = False
) -> list[int]:
    """Return indices of the rows in the order of training: whole shuffled passes, one by one.

    A micro-batch that needs the most memory comes first: what the allocator keeps after the first
    update is enough for the others.

    Args:
        sizes: Tokens of each row where rows are padded, trained tokens where they are packed.
        num_rows: Rows to train in all.
        seed: The same seed gives the same order.
        rows: Rows of a micro-batch.
        padded: Rows of a micro-batch are padded to one length, so similar lengths come together.
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_rows:
        first = len(order)
        order += rng.sample(range(len(sizes)), len(sizes))
        if padded and rows > 1:
            _group_pass(order, first, sizes, rows, seed)
        if first == 0:
            _put_largest_first(order, sizes, rows, padded=padded)
    return order[:num_rows]


def _group_pass(order: list[int], first: int, sizes: Sequence[int], rows: int, seed: int) -> None:
    """Order a pass so that rows of a micro-batch have similar lengths.

    Micro-batches that also hold rows of another pass, at both ends, stay as they are.
    """
    begin, end = -(-first // rows) * rows, len(order) // rows * rows
    inside = np.asarray(order[begin:end], dtype=np.int64)
    order[begin:end] = inside[length_groups(np.asarray(sizes)[inside], rows, seed + first)].tolist()


def _put_largest_first(order: list[int], sizes: Sequence[int], rows: int, *, padded: bool) -> None:
    """Swap the first micro-batch of a pass with the one that needs the most memory."""
    in_order = np.asarray(sizes)[order]
    starts = range(0, len(order), rows)
    reduced = (np.maximum if padded else np.add).reduceat(in_order, starts)
    start = int(reduced.argmax()) * rows
    moved = min(rows, len(order) - start)  # the last one of a pass may go on in the next
    order[:moved], order[start : start + moved] = order[start : start + moved], order[:moved]


def largest_batch(
    lengths: Sequence[int], trained: Sequence[int], order: Sequence[int], rows: int
) -> tuple[int, int]:
    """The most tokens of one row and the most trained tokens that a micro-batch has.

    Args:
        lengths: Tokens of each row.
        trained: Trained tokens of each row.
        order: Indices of the rows in the order of training.
        rows: Rows of a micro-batch.
    """
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    longest = max(lengths[index] for index in order)
    return longest, max(sum(trained[index] for index in batch) for batch in batches)
