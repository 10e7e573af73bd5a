"""Is tuned better than base, or is it luck? The same rows, drawn again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DRAWS = 2000
NUMBERS_AT_ONCE = 2**20
"""Drawn rows that are held at once."""
BOUNDS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""


def _means(
    changes: npt.NDArray[Any], counts: npt.NDArray[Any], generator: np.random.Generator
) -> Iterator[npt.NDArray[Any]]:
    """Mean change of every draw, so many draws at once that they fit."""
    rows = len(counts)
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    for first in range(0, DRAWS, at_once):
        drawn = generator.integers(0, rows, (min(at_once, DRAWS - first), rows))
        yield changes[drawn].sum(1) / counts[drawn].sum(1)


def paired_change(
    base: Sequence[float],
    tuned: Sequence[float],
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, float | bool]:
    """Mean change from base to tuned with its bootstrap interval (Efron, 1979), rows as units.

    Args:
        base: A value of each row.
        tuned: The same rows'.
        weights: What a row counts, such as its trained tokens; 1 if not given.
        seed: Of the draws.

    Returns:
        `change`, `low`, `high`, and `clear`: the interval leaves out zero.
    """
    counts = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=float)
    changes = (np.asarray(tuned) - np.asarray(base)) * counts
    means = np.concatenate(list(_means(changes, counts, np.random.default_rng(seed))))
    low, high = (float(bound) for bound in np.percentile(means, BOUNDS))
    change = float(changes.sum() / counts.sum())
    return {"change": change, "low": low, "high": high, "clear": low > 0 or high < 0}
