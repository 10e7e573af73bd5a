"""Rows as a person can check them: the very tokens, as text, trained ones apart from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

SHOWN_ROWS = 5
SHOWN_CHARACTERS = 1500
"""Of each run of trained or masked text; its start and its end are shown."""
SHOWN_RUNS = 40
"""Of a row; the first and the last of them are shown."""


def runs(trained: Sequence[bool] | npt.NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """Stretches of tokens that are trained, or are not: start, end, which.

    >>> runs([False, True, True])
    [(0, 1, False), (1, 3, True)]
    """
    flags = np.asarray(trained, dtype=np.bool_)
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return [(a, b, bool(flags[a])) for a, b in pairwise(edges) if a < b]


def _short(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def example(row: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """One token row as text, for the report.

    Args:
        row: Of the row file.
        tokenizer: Decodes.
        file: Where the row stands.
    """
    ids = row["input_ids"]

    def decoded(start: int, end: int) -> str:
        return _short(
            str(
                tokenizer.decode(
                    ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
        )

    shown = runs(row["trained"])
    if len(shown) > SHOWN_RUNS:
        half = SHOWN_RUNS // 2
        shown = [*shown[:half], *shown[-half:]]
    return {
        "file": file,
        "row": row["row"],
        "part": row["part"],
        "tokens": len(ids),
        "trained_tokens": int(sum(row["trained"])),
        "runs_left_out": max(0, len(runs(row["trained"])) - SHOWN_RUNS),
        "runs": [[decoded(start, end), flag] for start, end, flag in shown],
    }


def spread(lengths: npt.NDArray[Any], count: int = SHOWN_ROWS) -> list[int]:
    """Indices of a few rows from the shortest to the longest.

    >>> spread(np.array([5, 1, 9, 3, 2]), 3)
    [1, 3, 2]
    """
    order = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [int(order[round(float(place))]) for place in places]
