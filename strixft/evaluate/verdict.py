"""The result of an evaluation in one sentence, and what was forgotten in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _change(figures: Mapping[str, Any], name: str) -> str:
    """Return both losses, and their change with its interval where it is known."""
    loss, change = figures["metrics"][name], figures.get("changes", {}).get(name)
    both = f"{loss['base']:.3f} → {loss['tuned']:.3f}"
    if change is None:
        return both
    interval = f"{change['low']:+.3f} to {change['high']:+.3f}"
    return f"{both} ({change['change']:+.3f}, 95 % interval {interval})"


def _is_clear(figures: Mapping[str, Any], name: str) -> bool:
    return bool(figures.get("changes", {}).get(name, {}).get("clear"))


def verdict(figures: Mapping[str, Any]) -> str:
    """Return whether the tuned model is better than its base, from the figures of `evaluate`."""
    loss = figures["metrics"]["loss"]
    if not _is_clear(figures, "loss"):
        said = "No clear difference from the base"
    else:
        said = f"{'Better' if loss['tuned'] < loss['base'] else 'Worse'} than the base"
    rows = f" on {figures['rows_loss']} held-out rows" if "rows_loss" in figures else ""
    return f"{said}{rows}: loss {_change(figures, 'loss')}; lower is better."


def forgotten(figures: Mapping[str, Any]) -> str:
    """Return whether general texts got harder for the tuned model; empty if it was not asked."""
    loss = figures["metrics"].get("general_loss")
    if loss is None:
        return ""
    if not _is_clear(figures, "general_loss"):
        said = "No clear change on general texts"
    elif loss["tuned"] > loss["base"]:
        said = "Some general ability was lost"
    else:
        said = "General texts got easier, too"
    return f"{said}: loss {_change(figures, 'general_loss')}."
