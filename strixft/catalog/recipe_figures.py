"""Predicted need and speed of each recipe that ships, for lists that cannot wait for a plan.

`dev/recipe_table.py` writes the file, together with `docs/recipes.md`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".csv")

PLANNED_HOST = "strix-halo-128"
"""The machine of these figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFigures:
    """The need of a recipe on `PLANNED_HOST`, with rows of `max_length`; predicted."""

    need_bytes: int
    """By the plan that would be chosen: reserved, and outside the allocator."""
    least_bytes: int
    """By the smallest plan: one row, every layer recomputed."""
    tok_per_s: float
    weights_bytes: int
    """Size of the model's weights on the hub, 2 bytes each: the download."""


@cache
def recipe_figures() -> dict[str, RecipeFigures]:
    """Return the figures by name of the recipe."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return {
            row.pop("recipe"): RecipeFigures(
                tok_per_s=float(row.pop("tok_per_s")),
                **{name: int(value) for name, value in row.items()},
            )
            for row in csv.DictReader(file)
        }
