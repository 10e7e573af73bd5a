"""The plan as tables and pictures."""

from __future__ import annotations

from typing import Any

from strixft import views
from strixft.units import GIB, format_gib, format_number, format_seconds

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


def _fits(figures: Figures) -> str:
    answer = "yes" if figures["fits"] else "NO"
    if not figures["boxes"]:
        return answer
    return f"{answer}, on {figures['boxes']['count']} machines; the figures below are of one alone"


def summary(figures: Figures) -> dict[str, str]:
    """The plan in a few lines."""
    host, choice = figures["host"], figures["choice"]
    return {
        "fits": _fits(figures),
        "host": host["name"],
        "budget": f"{format_gib(host['budget_bytes'])} ({host['source']})",
        "peak, allocated": format_gib(figures["peak_bytes"]),
        "peak, reserved": format_gib(figures["reserved_bytes"]),
        "outside the allocator": format_gib(figures["outside_bytes"]),
        "rows per micro-batch": f"{choice['micro_batch_rows']} of {choice['max_length']} tokens",
        "micro-batches per update": str(choice["gradient_accumulation_steps"]),
        "layers recomputed": f"{choice['recomputed_layers']} of {choice['num_layers']}",
        "updates": format_number(figures["updates"]),
        "time per update, predicted": format_seconds(figures["seconds_per_update"]),
        "time in all, predicted": format_seconds(figures["seconds_total"]),
        "tokens per second, predicted": format_number(figures["tok_per_s"], 1),
    }


def breakdown(figures: Figures) -> str:
    """A picture of the peak by part, against the budget."""
    figure, axes = views.new_figure(6.8, 1.6)
    left, budget = 0.0, figures["host"]["budget_bytes"] / GIB
    for name, size in figures["parts"].items():
        width = size / GIB
        if width:
            label = f"{name}, {width:.2f} GiB"
            axes.barh(0, width, left=left, color=PART_COLOURS[name], label=label)
        left += width
    axes.axvline(budget, color=views.INK, linestyle="--", linewidth=1.2)
    axes.set_xlim(0, 1.05 * max(left, budget) if left > budget / 20 else left * 1.3)
    axes.set_yticks([])
    axes.set_xlabel("GiB at the peak; dashed: the budget")
    above = (0.5, 1.75)
    axes.legend(fontsize=7.5, ncols=3, loc="upper center", bbox_to_anchor=above, frameon=False)
    return views.picture(figure, "memory at the peak by part, against the budget")


def frontier(figures: Figures) -> str:
    """A picture of memory against tokens per second; empty where no time is known."""
    points = [point for point in figures["frontier"] if point["tok_per_s"]]
    if not points:
        return ""
    figure, axes = views.new_figure(6.4, 3.0)
    for point in points:
        x, y = point["need_bytes"] / GIB, point["tok_per_s"]
        axes.scatter(x, y, color=views.BASE, s=28, zorder=2)
        label = f"{point['rows']} rows, {point['recomputed_layers']} recomputed"
        axes.annotate(label, (x, y), fontsize=7.5, xytext=(5, 4), textcoords="offset points")
    x, y = figures["reserved_bytes"] / GIB, figures["tok_per_s"]
    axes.scatter(x, y, color=views.TUNED, s=70, zorder=3, label="chosen")
    budget = figures["host"]["budget_bytes"] / GIB
    axes.axvline(budget, color=views.INK, linestyle="--", linewidth=1.2, label="budget")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("GiB reserved")
    axes.set_ylabel("tokens/s, predicted")
    axes.legend(fontsize=8, frameon=False)
    return views.picture(figure, "plans: memory against predicted tokens per second")


Table = tuple[list[list[str]], list[str]]
"""Rows and header."""


def _warnings(figures: Figures) -> Table:
    return [[text] for text in figures["warnings"]], ["to know"]


def _boxes(figures: Figures) -> Table:
    if not figures["boxes"]:
        return [], []
    rows = [
        [
            f"each of {figures['boxes']['count']}, {share['way']}",
            format_gib(share["device_bytes"]),
            "yes" if share["fits"] else "NO",
            f"{share['micro_batch_rows']} × {share['gradient_accumulation_steps']}",
            str(share["recomputed_layers"]),
            format_seconds(share["compute_seconds_per_update"]),
            format_gib(share["sent_bytes_per_update"]),
        ]
        for share in figures["boxes"]["shares"]
    ]
    header = ["machine", "needs", "fits", "rows × micro-batches", "layers recomputed"]
    return rows, [*header, "an update, without the link", "sent for an update"]


def _parts(figures: Figures) -> Table:
    rows = [[name, format_gib(size)] for name, size in figures["parts"].items() if size]
    return rows, ["part at the peak", "memory"]


def _frontier(figures: Figures) -> Table:
    rows = [
        [
            str(point["rows"]),
            str(point["recomputed_layers"]),
            str(point["steps"]),
            format_gib(point["need_bytes"]),
            format_number(point["tok_per_s"], 1),
        ]
        for point in figures["frontier"]
    ]
    header = ["rows", "layers recomputed", "micro-batches", "needs", "tokens/s, predicted"]
    return rows, header


def _advice(figures: Figures) -> Table:
    rows = [
        [
            row["change"],
            format_gib(row["peak_bytes"]),
            format_seconds(row["seconds_per_update"]),
            "yes" if row["fits"] else "no",
        ]
        for row in figures["advice"]
    ]
    return rows, ["change", "needs", "time per update", "fits"]


def tables(figures: Figures) -> list[Table]:
    """The plan as tables for a terminal."""
    first: Table = [list(row) for row in summary(figures).items()], ["plan", ""]
    rest = [
        _warnings(figures),
        _boxes(figures),
        _parts(figures),
        _frontier(figures),
        _advice(figures),
    ]
    return [first, *(table for table in rest if table[0])]


def _phases(figures: Figures) -> str:
    rows = [
        [name, format_gib(phase["device_bytes"]), format_gib(phase["host_bytes"])]
        for name, phase in figures["phases"].items()
    ]
    return views.table(rows, ["phase", "device", "host"])


def _assumptions(figures: Figures) -> str:
    rows = [
        [row["what"], row["value"] if row["value"] is not None else "–", row["source"]]
        for row in figures["assumptions"]
    ]
    return views.table(rows, ["assumed", "value", "source"])


def plan_html(figures: Figures) -> str:
    """The whole plan for a notebook or the report."""
    return "".join(
        (
            views.mapping(summary(figures)),
            *map(views.warning, figures["warnings"]),
            breakdown(figures),
            views.table(*_boxes(figures)) if figures["boxes"] else "",
            views.table(*_advice(figures)) if figures["advice"] else "",
            frontier(figures),
            views.table(*_frontier(figures)),
            _phases(figures),
            _assumptions(figures),
        )
    )
