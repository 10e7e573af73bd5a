"""The plan as tables and pictures."""

from __future__ import annotations

from typing import Any

from strixft import views
from strixft.plan import pictures
from strixft.plan.advice import cause
from strixft.units import format_gib, format_number, format_seconds

Figures = dict[str, Any]


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
        **({} if figures["fits"] else {"because": cause(figures["parts"], host["budget_bytes"])}),
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
            pictures.breakdown(figures),
            pictures.advice(figures),
            views.table(*_boxes(figures)) if figures["boxes"] else "",
            views.table(*_advice(figures)) if figures["advice"] else "",
            pictures.frontier(figures),
            views.table(*_frontier(figures)),
            _phases(figures),
            _assumptions(figures),
        )
    )
