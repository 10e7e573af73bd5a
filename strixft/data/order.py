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
    lengths: Sequence[int], num_rows: int, seed: int, padded_rows: int = 1
) -> list[int]:
    """Return indices of the rows in the order of training: whole shuffled passes, one by one.

    The longest row comes first, so that the first update needs the most memory of all.

    Args:
        lengths: Tokens of each row.
        num_rows: Rows to train in all.
        seed: The same seed gives the same order.
        padded_rows: Rows of a micro-batch that are padded to one length: rows of similar length
            come together then. 1 where rows are packed.
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_rows:
        first = len(order)
        order += rng.sample(range(len(lengths)), len(lengths))
        if first == 0:
            longest = order.index(max(range(len(lengths)), key=lengths.__getitem__))
            order[0], order[longest] = order[longest], order[0]
        if padded_rows > 1:
            _group_pass(order, first, lengths, padded_rows, seed)
    return order[:num_rows]


def _group_pass(order: list[int], first: int, lengths: Sequence[int], rows: int, seed: int) -> None:
    """Order a pass so that rows of a micro-batch have similar lengths.

    Micro-batches that also hold rows of another pass, at both ends, stay as they are.
    """
    begin, end = -(-first // rows) * rows, len(order) // rows * rows
    inside = np.asarray(order[begin:end])
    if len(inside) == 0:
        return
    grouped = inside[length_groups(np.asarray(lengths)[inside], rows, seed + first)]
    if begin == 0:  # the longest row was the first, and its micro-batch is again
        whole = grouped.reshape(-1, rows)
        longest = int((whole == inside[0]).any(axis=1).argmax())
        whole[[0, longest]] = whole[[longest, 0]]
    order[begin:end] = grouped.tolist()


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
