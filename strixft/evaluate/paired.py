"""Is tuned better than base, or is it luck? The same rows, drawn again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2000
BOUNDS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""


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
    drawn = np.random.default_rng(seed).integers(0, len(counts), (DRAWS, len(counts)))
    means = changes[drawn].sum(1) / counts[drawn].sum(1)
    low, high = (float(bound) for bound in np.percentile(means, BOUNDS))
    change = float(changes.sum() / counts.sum())
    return {"change": change, "low": low, "high": high, "clear": low > 0 or high < 0}
