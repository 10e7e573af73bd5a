"""Losses that jump out of their course."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

BEFORE = 20
"""Updates that say what is usual."""
LEAST = 5
TIMES = 6.0
"""Median deviations above the median of what came before."""
LEAST_RISE = 0.1
"""A smaller rise is none, in shares of the median."""


def loss_spikes(losses: Sequence[float]) -> list[int]:
    """Updates, counted from 1, whose loss stands far above those before.

    >>> loss_spikes([2.0, 1.9, 1.8, 1.8, 1.7, 1.7, 6.0, 1.6])
    [7]
    """
    found = []
    for index in range(LEAST, len(losses)):
        before = losses[max(0, index - BEFORE) : index]
        usual = statistics.median(before)
        spread = statistics.median(abs(loss - usual) for loss in before)
        rise = losses[index] - usual
        if rise > TIMES * spread and rise > LEAST_RISE * usual:
            found.append(index + 1)
    return found
