"""A training as people see it: losses, and planned against real memory and speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from strixft.step.memory_tracker import MemoryTracker
from strixft.support import html
from strixft.support.units import format_gib, format_number, format_seconds

Figures = Mapping[str, Any]

GAP_FLAGGED = 0.03
"""Share by which the measured peak may differ from the plan before the report says so."""

EVALUATED = {"held_out_loss": ("held out", "o-"), "general_loss": ("general texts", "o:")}
"""Losses between updates, with their names and marks in a picture."""

SUMMED = ("activations", "head", "workspace")
REST = ", ".join(SUMMED)
"""Parts that a GPU's own count cannot tell apart."""


def device_parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, peak_bytes: int
) -> dict[str, int]:
    """Return the peak of a GPU by part: parts that stay between updates, and the rest.

    Args:
        model: The model after training.
        optimizer: The optimiser with its state.
        peak_bytes: The peak that torch counted.
    """
    tracker = MemoryTracker()
    tracker.watch_model(model)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                tracker.watch(value, "optimizer")
    known = {name: size for name, size in tracker.live.items() if size}
    known["gradients"] = known.get("adapter", 0)  # a gradient is as large as what is trained
    return {**known, REST: peak_bytes - sum(known.values())}


def gap(real: float | None, planned: float | None) -> float | None:
    """Return real ÷ planned − 1; None where either is not known."""
    return None if not real or not planned else real / planned - 1


def warning(figures: Figures) -> str | None:
    """Return a sentence, if the peak was further off the plan than it should be."""
    off = gap(figures["peak_bytes"], figures["planned_peak_bytes"])
    if off is None or abs(off) <= GAP_FLAGGED:
        return None
    return f"The measured peak is {off:+.1%} off the plan."


def _row(name: str, planned: float | None, real: float | None, shown: Any) -> list[str]:
    off = gap(real, planned)
    return [name, shown(planned), shown(real), "–" if off is None else f"{off:+.1%}"]


def breakdowns(figures: Figures) -> str:
    """Return a table of both peaks by part."""
    real, planned = figures["peak_parts"], dict(figures["planned_parts"])
    if REST in real:
        planned = {name: planned.get(name, 0) for name in real}
        planned[REST] = sum(figures["planned_parts"][name] for name in SUMMED)
    names = [name for name in {**planned, **real} if planned.get(name) or real.get(name)]
    rows = [_row(n, planned.get(n, 0), real.get(n, 0), format_gib) for n in names]
    return html.table(rows, ["part at the peak", "planned", "real", "difference"])


def compare_html(figures: Figures) -> str:
    """Return the plan beside the training; a gap above 3 % is flagged, with both breakdowns."""
    shown = {
        "peak, allocated": ("peak_bytes", format_gib),
        "peak, reserved": ("reserved_bytes", format_gib),
        "tokens per second": ("tok_per_s", lambda rate: format_number(rate, 1)),
    }
    rows = [
        _row(name, figures[f"planned_{key}"], figures[key], form)
        for name, (key, form) in shown.items()
    ]
    text = warning(figures)
    flagged = html.warning(text) + breakdowns(figures) if text else ""
    return html.table(rows, ["", "planned", "real", "difference"]) + flagged


def _loss_curve(losses: list[float], spikes: list[int], evaluations: list[Figures]) -> str:
    figure, axes = html.new_figure()
    axes.plot(range(1, len(losses) + 1), losses, color=html.TUNED, linewidth=1.5, label="training")
    for key, (name, style) in EVALUATED.items():
        points = [(one["update"], one[key]) for one in evaluations if one[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=html.BASE, markersize=3, label=name)
            axes.legend(frameon=False, fontsize=9)
    axes.plot(spikes, [losses[at - 1] for at in spikes], "v", color=html.INK, markersize=5)
    axes.set_xlabel("update")
    axes.set_ylabel("loss per trained token")
    axes.set_ylim(bottom=0)
    return html.picture(figure, "losses by update")


def _held_out(told: Figures) -> dict[str, str]:
    """Return what held-out losses say of the training; without them, nothing."""
    first, *_, last = told["evaluations"]
    low, kept = told["best"], told["kept"]
    shown = {
        f"loss, {name}": f"{format_number(first[key], 4)} before,"
        f" {format_number(last[key], 4)} at the end"
        for key, (name, _) in EVALUATED.items()
        if first[key] is not None
    }
    if low:
        lowest = f"{format_number(low['held_out_loss'], 4)}, after update {low['update']}"
        shown["lowest held-out loss"] = lowest
    return {**shown, "weights evaluated and exported": f"the {kept} ones"}


def coverage_html(told: Figures) -> str:
    """Return a table of what was trained, and what proved it."""
    rows = [
        [kind["name"], kind["trained"], kind["layers"] or "outside the layers"]
        for kind in told["kinds"]
    ]
    size = f"{told['tensors']} tensors, {format_number(told['parameters'])} weights"
    text = f"Trained: {size}; nothing in {', '.join(told['frozen']) or 'no module'} was."
    if "moved" in told:
        proven = f"{told['moved']} of them moved in the first {told['updates']} updates"
        if told["unreached_experts"]:
            proven += f", {told['unreached_experts']} belong to experts that no token reached"
        if "adapter_changes" in told:
            proven += f"; the adapter changed hidden states by {told['adapter_changes']:.1g}"
        text += f" {proven}."
    return html.note(text) + html.table(rows, ["what was trained", "in layers", "of"])


def trained_html(figures: Figures) -> str:
    """Return a training's figures for a notebook or the report."""
    warnings, spikes = list(figures["warnings"]), figures["spikes"]
    if spikes:
        listed = ", ".join(map(str, spikes))
        warnings.append(f"The loss jumped at these updates, marked below: {listed}.")
    if figures["checkpoints_set_aside"]:
        warnings.append(f"Torn, so set aside: {'; '.join(figures['checkpoints_set_aside'])}.")
    shown = {
        "updates": format_number(figures["updates"]),
        "loss, first update": format_number(figures["losses"][0]),
        "loss, last update": format_number(figures["losses"][-1]),
        "time": format_seconds(figures["train_seconds"]),
        "process, resident": format_gib(figures["resident_bytes"]),
    }
    told_held_out = figures.get("held_out") or {}  # a run of an older version has none
    evaluations = told_held_out.get("evaluations") or []
    if len(evaluations) > 1:
        shown |= _held_out(told_held_out)
    if proof := figures["proof"]:
        own, apart = format_number(proof["own_loss"], 5), f"{proof['difference']:.2g}"
        shown["first loss"] = (
            f"{format_number(proof['loss'], 5)} on {proof['tokens']} tokens; the model's own"
            f" forward {own}, at most {apart} nats a token apart;"
            f" comparing took {format_seconds(proof['seconds'])}"
        )
    told = "".join(map(html.warning, warnings))
    covered = coverage_html(figures["trained"]) if figures.get("trained") else ""
    curve = _loss_curve(figures["losses"], spikes, evaluations)
    return told + html.mapping(shown) + compare_html(figures) + covered + curve
