"""Which rows are trained and which are held out: by what they say, not by where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.hashes import Hashes, uniform

Indices = npt.NDArray[np.int64]
_WEIGHT = 1
"""Salt of the hash that decides which rows of a source with a weight are taken."""


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of rows; with a weight above 1 a training row stands more than once."""

    train: Indices
    validation: Indices


def split_rows(
    keys: Hashes, kept: npt.NDArray[np.bool_], weights: npt.NDArray[Any], fraction: float
) -> Split:
    """Divide rows by the hash of their content, or of their group.

    A row keeps its side when the set grows. At least one row is held out where there are two
    different ones, and one is always trained.

    Args:
        keys: Rows with one key stay together.
        kept: Rows that take part.
        weights: How often one pass takes each row.
        fraction: Share that is held out.
    """
    chosen = uniform(keys, salt=_WEIGHT) < weights % 1
    times = np.where(kept, np.floor(weights).astype(np.int64) + chosen, 0)
    rows = np.flatnonzero(times)
    places = uniform(keys[rows])
    held_out = places < _limit(places, fraction)
    return Split(np.repeat(rows, times[rows])[~np.repeat(held_out, times[rows])], rows[held_out])


def _limit(places: npt.NDArray[np.float64], fraction: float) -> float:
    different = np.unique(places)
    if fraction <= 0 or len(different) < 2:
        return 0.0
    # at least the lowest, never the highest
    return float(min(max(fraction, np.nextafter(different[0], 1)), different[-1]))
