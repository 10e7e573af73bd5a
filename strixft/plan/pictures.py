"""The plan as pictures: what fills the memory, what was chosen from, and what would help."""

from __future__ import annotations

from typing import Any

from strixft import views
from strixft.units import GIB, format_seconds

Figures = dict[str, Any]
PART_COLOURS = {
    "weights": "#1e3a5f",
    "adapter": "#3b6ea5",
    "gradients": "#7fa8d1",
    "optimizer": "#b9cfe6",
    "activations": "#c2410c",
    "head": "#f59e0b",
    "workspace": "#94a3b8",
}
BEYOND = "#e2e8f0"
"""What the allocator holds beyond the peak, and what lies outside it."""
FITS, FITS_NOT = "#3b6ea5", "#cbd5e1"


def _budget_line(axes: Any, figures: Figures) -> None:
    budget = figures["host"]["budget_bytes"] / GIB
    axes.axvline(budget, color=views.INK, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"budget, {budget:.0f} GiB",
        (budget, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=views.INK,
    )


def breakdown(figures: Figures) -> str:
    """The peak by part, against the budget."""
    figure, axes = views.new_figure(6.8, 1.7)
    beyond = figures["reserved_bytes"] - figures["peak_bytes"] + figures["outside_bytes"]
    left, budget = 0.0, figures["host"]["budget_bytes"] / GIB
    for name, size in (*figures["parts"].items(), ("reserved and outside", max(beyond, 0))):
        width, colour = size / GIB, PART_COLOURS.get(name, BEYOND)
        if width >= 0.005:
            axes.barh(0, width, left=left, color=colour, label=f"{name}, {width:.2f} GiB")
        left += width
    is_near = left > budget / 20  # else the parts would be too thin to see
    axes.set_xlim(0, 1.05 * max(left, budget) if is_near else left * 1.3)
    if is_near:
        _budget_line(axes, figures)
    axes.set_yticks([])
    axes.set_xlabel("GiB at the peak" + ("" if is_near else f"; the budget is {budget:.0f} GiB"))
    below = (0.5, -0.55)
    axes.legend(fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=below, frameon=False)
    return views.picture(figure, "memory at the peak by part, against the budget")


def _name(point: dict[str, Any]) -> str:
    rows, layers = point["rows"], point["recomputed_layers"]
    return f"{rows} row{'s' if rows > 1 else ''}, {layers} recomputed"


def _is_chosen(point: Figures, figures: Figures) -> bool:
    return bool(point["rows"] == figures["choice"]["micro_batch_rows"])


def runner_up(figures: Figures) -> Figures | None:
    """The fastest plan of another number of rows that can fit."""
    budget = figures["host"]["budget_bytes"]
    others = [
        point
        for point in figures["frontier"]
        if not _is_chosen(point, figures) and point["need_bytes"] <= budget
    ]
    return others[0] if others else None


def frontier(figures: Figures) -> str:
    """Memory against tokens per second; empty where no time is known."""
    points = [point for point in figures["frontier"] if point["tok_per_s"]]
    if not points:
        return ""
    figure, axes = views.new_figure(6.8, 3.2)
    second, budget = runner_up(figures), figures["host"]["budget_bytes"]
    for point in points:
        if _is_chosen(point, figures) and figures["fits"]:
            continue
        x, y = point["need_bytes"] / GIB, point["tok_per_s"]
        colour = FITS if point["need_bytes"] <= budget else FITS_NOT
        axes.scatter(x, y, color=colour, s=30, zorder=2)
        text = ("runner-up: " if point is second else "") + _name(point)
        axes.annotate(
            text, (x, y), fontsize=7.5, xytext=(-6, -3), textcoords="offset points", ha="right"
        )
    if figures["fits"]:
        x = (figures["reserved_bytes"] + figures["outside_bytes"]) / GIB
        chosen = {"rows": figures["choice"]["micro_batch_rows"], **figures["choice"]}
        axes.scatter(x, figures["tok_per_s"], color=views.TUNED, s=70, zorder=3)
        axes.annotate(
            f"chosen: {_name(chosen)}",
            (x, figures["tok_per_s"]),
            fontsize=8,
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=views.TUNED,
            fontweight="bold",
        )
    _budget_line(axes, figures)
    axes.margins(x=0.45, y=0.25)
    axes.set_xlabel("GiB needed")
    axes.set_ylabel("tokens/s, predicted")
    return views.picture(figure, "plans: memory against predicted tokens per second")


def advice(figures: Figures) -> str:
    """What each change would need and take, against the budget; empty where the run fits."""
    rows = figures["advice"]
    if not rows:
        return ""
    figure, axes = views.new_figure(6.8, 0.8 + 0.42 * len(rows))
    for place, row in enumerate(reversed(rows)):
        size = row["peak_bytes"] / GIB
        axes.barh(place, size, color=FITS if row["fits"] else FITS_NOT, height=0.7)
        seconds = row["seconds_per_update"]
        time = f", {format_seconds(seconds)} an update" if seconds else ""
        end = max(size, figures["host"]["budget_bytes"] / GIB)  # clear of the budget's line
        axes.annotate(f" {size:.1f} GiB{time}", (end, place), va="center", fontsize=7.5)
    changes = [row["change"].removeprefix("--set ").split(" --set ")[0] for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), changes, fontsize=7.5)
    _budget_line(axes, figures)
    axes.margins(x=0.35)
    axes.set_xlabel("GiB needed with this change; blue: it fits")
    return views.picture(figure, "changes that would help, against the budget")
