"""Planned against real, after a training: memory, speed, and both breakdowns where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from strixft.step.tracker import MemoryTracker
from strixft.support import html
from strixft.support.units import format_gib, format_number

Figures = Mapping[str, Any]

GAP_FLAGGED = 0.03
"""Share by which the measured peak may differ from the plan before the report says so."""

REST = "activations, head, workspace"
"""What a GPU's own count cannot tell apart."""


def planned_figures(plan: Figures) -> dict[str, Any]:
    """What a plan said, as the figures of a training keep it."""
    return {
        "planned_peak_bytes": plan["peak_bytes"],
        "planned_reserved_bytes": plan["reserved_bytes"],
        "planned_parts": plan["parts"],
        "planned_tok_per_s": plan["tok_per_s"],
    }


def device_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, peak_bytes: int
) -> dict[str, int]:
    """The peak of a GPU by part, as far as it is known: what stays between updates, and the rest.

    Args:
        model: After training.
        optimizer: With its state.
        peak_bytes: What torch counted.
    """
    tracker = MemoryTracker()
    tracker.watch_model(model)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                tracker.watch(value, "optimizer")
    known = {name: size for name, size in tracker.live.items() if size}
    trained = known.get("adapter", 0)  # a gradient is as large as what is trained
    known["gradients"] = trained
    return {**known, REST: peak_bytes - sum(known.values())}


def gap(real: float | None, planned: float | None) -> float | None:
    """Real ÷ planned − 1; None where either is not known."""
    return None if not real or not planned else real / planned - 1


def memory_gap(figures: Figures) -> float | None:
    """Measured peak ÷ planned peak − 1; None where it was not measured."""
    return gap(figures["peak_bytes"], figures["planned_peak_bytes"])


def warning(figures: Figures) -> str | None:
    """A sentence, if the peak was further off the plan than it should be."""
    off = memory_gap(figures)
    if off is None or abs(off) <= GAP_FLAGGED:
        return None
    return f"The measured peak is {off:+.1%} off the plan."


def _row(name: str, planned: float | None, real: float | None, shown: Any) -> list[str]:
    off = gap(real, planned)
    return [name, shown(planned), shown(real), "–" if off is None else f"{off:+.1%}"]


def table(figures: Figures) -> str:
    """Planned and real figures side by side."""
    rows = [
        _row("peak, allocated", figures["planned_peak_bytes"], figures["peak_bytes"], format_gib),
        _row(
            "peak, reserved",
            figures["planned_reserved_bytes"],
            figures["reserved_bytes"],
            format_gib,
        ),
        _row(
            "tokens per second",
            figures["planned_tok_per_s"],
            figures["tok_per_s"],
            lambda rate: format_number(rate, 1),
        ),
    ]
    return html.table(rows, ["", "planned", "real", "difference"])


def _planned_rest(parts: Figures) -> int:
    return sum(parts[name] for name in ("activations", "head", "workspace"))


def breakdowns(figures: Figures) -> str:
    """Both peaks by part."""
    real, planned = figures["peak_parts"], dict(figures["planned_parts"])
    if REST in real:
        planned[REST] = _planned_rest(planned)
    names = [name for name in {**planned, **real} if planned.get(name) or real.get(name)]
    if REST in real:
        names = [name for name in names if name in real]
    rows = [_row(n, planned.get(n, 0), real.get(n, 0), format_gib) for n in names]
    return html.table(rows, ["part at the peak", "planned", "real", "difference"])


def compare_html(figures: Figures) -> str:
    """The comparison; a gap above 3 % is flagged, with both breakdowns."""
    text = warning(figures)
    flagged = html.warning(text) + breakdowns(figures) if text else ""
    return table(figures) + flagged
