"""The order in which rows are trained, known before training begins."""

from __future__ import annotations

import random
from collections.abc import Sequence


def training_order(lengths: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """Indices of the rows in the order of training: whole shuffled passes, one after the other.

    The longest row comes first, so the first update needs the most memory of all.

    Args:
        lengths: Tokens of each row.
        num_rows: Rows to train in all.
        seed: The same seed gives the same order.
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_rows:
        order += rng.sample(range(len(lengths)), len(lengths))
    longest = order.index(max(range(len(lengths)), key=lengths.__getitem__))
    order[0], order[longest] = order[longest], order[0]
    return order[:num_rows]


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
