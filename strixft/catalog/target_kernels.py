"""Kernels of each recipe's layers, as the compiler for gfx1151 makes them.

`dev/target_kernels.py recipes` writes the file, on any machine; nothing was run on a gfx1151.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from strixft.catalog.hosts import STRIX_HALO

FILE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKernels:
    """Kernels that inductor writes for a recipe's layers; sizes are the largest of all."""

    recipe: str
    model: str
    graphs: int
    kernels: int
    configurations: int
    """Compiled: each kernel in every configuration that inductor would try."""
    failing: int
    """Configurations that do not compile, or need more local memory than there is."""
    spilling: int
    """Configurations that keep some of their values in memory instead of registers."""
    crowded: int
    """Others that leave room for fewer than 16 waves a SIMD."""
    lds_bytes: int
    vgprs: int
    spilled: int
    scratch_bytes: int
    triton: str
    torch: str
    problem: str = ""
    """The compiler's words for the first that fails."""


@cache
def recipe_kernels() -> dict[str, RecipeKernels]:
    """Return the rows by name of the recipe."""
    numbers = [field.name for field in fields(RecipeKernels) if field.type == "int"]
    with FILE.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    counted = ({name: int(row[name]) for name in numbers} for row in rows)
    return {row["recipe"]: RecipeKernels(**row | n) for row, n in zip(rows, counted, strict=True)}


def failing_kernels(model: str, architecture: str) -> RecipeKernels | None:
    """Return a row of a model whose kernels do not all compile for an architecture; or None."""
    rows = recipe_kernels().values() if architecture == STRIX_HALO else ()
    return next((row for row in rows if row.model == model and row.failing), None)
