"""Experts that the held-out tokens reach, before and after the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from strixft.support.units import format_number

NAMED = 8
"""Most layers whose idle experts are listed."""

Shares = Mapping[str, list[float]]
"""Share of the choices that fell on each expert, (E,), by module."""


def compare_experts(shares: Mapping[str, Shares]) -> list[dict[str, Any]]:
    """Return a row for each module of experts.

    Args:
        shares: Of `base` and of `tuned`.

    Returns:
        `module`; `experts`; `moved`, the share of choices that fall on other experts than before;
        and for each variant `idle`, the numbers of experts that no token reached, and `busiest`,
        the largest share.
    """
    rows = []
    for module, base in shares["base"].items():
        tuned = shares["tuned"][module]
        moved = float(np.abs(np.subtract(base, tuned)).sum() / 2)
        row: dict[str, Any] = {"module": module, "experts": len(base), "moved": moved}
        for name, own in (("base", base), ("tuned", tuned)):
            idle = [number for number, share in enumerate(own) if share == 0]
            row[name] = {"idle": idle, "busiest": max(own)}
        rows.append(row)
    return rows


def says(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on what `compare_experts` found."""
    if not rows:
        return []
    total = sum(row["experts"] for row in rows)
    idle = {name: sum(len(row[name]["idle"]) for row in rows) for name in ("base", "tuned")}
    busiest = {name: max(row[name]["busiest"] for row in rows) for name in ("base", "tuned")}
    moved = float(np.mean([row["moved"] for row in rows]))
    told = [
        f"Experts: {idle['tuned']} of {total} are reached by no held-out token (base"
        f" {idle['base']}); the busiest has {format_number(100 * busiest['tuned'])} % of a layer's"
        f" choices (base {format_number(100 * busiest['base'])} %). {format_number(100 * moved)} %"
        " of the choices fall on other experts than before."
    ]
    dead = [row for row in rows if row["tuned"]["idle"]]
    for row in dead[:NAMED]:
        numbers = ", ".join(map(str, row["tuned"]["idle"]))
        told.append(f"No held-out token reaches in {row['module']}: {numbers}.")
    if len(dead) > NAMED:
        told.append(f"So it is in {len(dead) - NAMED} more layers; result.json has them.")
    return told
