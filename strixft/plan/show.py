"""The plan as tables, pictures and sliders."""

from __future__ import annotations

from typing import Any

from strixft.plan.advice import cause
from strixft.support import html
from strixft.support.units import GIB, format_gib, format_number, format_seconds

Figures = dict[str, Any]

Rows = tuple[list[list[str]], list[str]]
"""The rows of a table, and its header."""


def sentence(
    *,
    need_bytes: int,
    budget_bytes: int,
    tok_per_s: float | None,
    seconds_per_update: float | None,
    seconds_total: float | None,
    about: bool = False,
) -> str:
    """Return memory, speed and time of a plan as one sentence.

    >>> sentence(need_bytes=98 * GIB, budget_bytes=109 * GIB, tok_per_s=100.2,
    ...          seconds_per_update=658, seconds_total=None)
    'Fits: 98 of 109 GiB, 100 tokens/s, 10 min 58 s a step'
    """
    digits = 0 if budget_bytes >= 20 * GIB else 1
    memory = f"{need_bytes / GIB:.{digits}f} of {budget_bytes / GIB:.{digits}f} GiB"
    words = [f"about {memory}" if about else memory]
    words += [f"{format_number(tok_per_s, 0)} tokens/s"] if tok_per_s else []
    words += [f"{format_seconds(seconds_per_update)} a step"] if seconds_per_update else []
    words += [f"{format_seconds(seconds_total)} in all"] if seconds_total else []
    return f"{'Fits' if need_bytes <= budget_bytes else 'Does not fit'}: {', '.join(words)}"


def headline(figures: Figures) -> str:
    """Return a plan as one sentence."""
    needs = {"need_bytes": figures["reserved_bytes"] + figures["outside_bytes"]}
    times = {name: figures[name] for name in ("tok_per_s", "seconds_per_update", "seconds_total")}
    return sentence(**needs, budget_bytes=figures["host"]["budget_bytes"], **times)


def _fits(figures: Figures) -> str:
    answer = "yes" if figures["fits"] else "NO"
    if not figures["boxes"]:
        return answer
    return f"{answer}, on {figures['boxes']['count']} machines; the figures below are of one alone"


def summary(figures: Figures) -> dict[str, str]:
    """Return the plan in a few lines."""
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
        **_held_out(figures.get("held_out")),
        "time in all, predicted": format_seconds(figures["seconds_total"]),
        "tokens per second, predicted": format_number(figures["tok_per_s"], 1),
    }


def _held_out(found: Figures | None) -> dict[str, str]:
    """Return when held-out losses are taken; plans of older versions do not say."""
    if found is None:
        return {}
    if not found["every"]:
        return {"held-out loss": f"not while training: {found['reason']}"}
    rows = f"{found['rows']:,} of {found['of']:,} rows"
    texts = found["general_texts"]
    general = f" and {texts} general texts" if texts else ""
    share = f"{found['fraction']:.1%} of the time"
    return {"held-out loss": f"every {found['every']:,} updates, {rows}{general}, {share}"}


def _yes(fits: bool, no: str = "NO") -> str:
    return "yes" if fits else no


def _boxes(figures: Figures) -> Rows:
    boxes = figures["boxes"] or {"count": 0, "shares": []}
    rows = [
        [
            f"each of {boxes['count']}, {share['way']}",
            format_gib(share["device_bytes"]),
            _yes(share["fits"]),
            f"{share['micro_batch_rows']} × {share['gradient_accumulation_steps']}",
            str(share["recomputed_layers"]),
            format_seconds(share["compute_seconds_per_update"]),
            format_gib(share["sent_bytes_per_update"]),
        ]
        for share in boxes["shares"]
    ]
    header = ["machine", "needs", "fits", "rows × micro-batches", "layers recomputed"]
    return rows, [*header, "an update, without the link", "sent for an update"]


def _frontier(figures: Figures) -> Rows:
    rows = [
        [
            f"{point['rows']}{' ★' if _is_chosen(point, figures) else ''}",
            str(point["recomputed_layers"]),
            str(point["steps"]),
            format_gib(point["need_bytes"]),
            format_number(point["tok_per_s"], 1),
        ]
        for point in figures["frontier"]
    ]
    return rows, ["rows", "layers recomputed", "micro-batches", "needs", "tokens/s, predicted"]


def _advice(figures: Figures) -> Rows:
    rows = [
        [
            row["change"],
            format_gib(row["peak_bytes"]),
            format_seconds(row["seconds_per_update"]),
            _yes(row["fits"], "no"),
        ]
        for row in figures["advice"]
    ]
    return rows, ["change", "needs", "time per update", "fits"]


def tables(figures: Figures) -> list[Rows]:
    """Return the plan as tables for a terminal."""
    parts = [[name, format_gib(size)] for name, size in figures["parts"].items() if size]
    found = [
        ([list(row) for row in summary(figures).items()], ["plan", ""]),
        ([[text] for text in figures["warnings"]], ["to know"]),
        _boxes(figures),
        (parts, ["part at the peak", "memory"]),
        _frontier(figures),
        _advice(figures),
    ]
    return [table for table in found if table[0]]


def plan_html(figures: Figures) -> str:
    """Return the whole plan for a notebook or the report."""
    boxes, changes = _boxes(figures), _advice(figures)
    of_phases = [
        [name, format_gib(phase["device_bytes"]), format_gib(phase["host_bytes"])]
        for name, phase in figures["phases"].items()
    ]
    assumed = [
        [row["what"], row["value"] if row["value"] is not None else "–", row["source"]]
        for row in figures["assumptions"]
    ]
    details = (
        frontier(figures),
        html.table(*_frontier(figures)),
        html.table(of_phases, ["phase", "device", "host"]),
        html.table(assumed, ["assumed", "value", "source"]),
    )
    return "".join(
        (
            "" if boxes[0] else f"<p><strong>{headline(figures)}</strong></p>",
            *map(html.warning, figures["warnings"]),
            breakdown(figures),
            advice(figures),
            html.table(*boxes) if boxes[0] else "",
            html.table(*changes) if changes[0] else "",
            html.mapping(summary(figures)),
            "<details><summary>Other plans, phases, and what is assumed</summary>",
            *details,
            "</details>",
        )
    )


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
"""Colour of what the allocator holds beyond the peak, and of what lies outside it."""

FITS, FITS_NOT = "#3b6ea5", "#cbd5e1"


def _budget_line(axes: Any, figures: Figures) -> None:
    budget = figures["host"]["budget_bytes"] / GIB
    axes.axvline(budget, color=html.INK, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"budget, {budget:.0f} GiB",
        (budget, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=html.INK,
    )


def breakdown(figures: Figures) -> str:
    """Return a picture of the peak by part, against the budget."""
    figure, axes = html.new_figure(6.8, 1.7)
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
    return html.picture(figure, "memory at the peak by part, against the budget")


def _name(point: dict[str, Any]) -> str:
    rows, layers = point["rows"], point["recomputed_layers"]
    return f"{rows} row{'s' if rows > 1 else ''}, {layers} recomputed"


def _is_chosen(point: Figures, figures: Figures) -> bool:
    return bool(point["rows"] == figures["choice"]["micro_batch_rows"])


def runner_up(figures: Figures) -> Figures | None:
    """Return the fastest plan of another number of rows that can fit."""
    budget = figures["host"]["budget_bytes"]
    others = [
        point
        for point in figures["frontier"]
        if not _is_chosen(point, figures) and point["need_bytes"] <= budget
    ]
    return others[0] if others else None


def frontier(figures: Figures) -> str:
    """Return a picture of memory against tokens per second; empty where no time is known."""
    points = [point for point in figures["frontier"] if point["tok_per_s"]]
    if not points:
        return ""
    figure, axes = html.new_figure(6.8, 3.2)
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
        axes.scatter(x, figures["tok_per_s"], color=html.TUNED, s=70, zorder=3)
        axes.annotate(
            f"chosen: {_name(chosen)}",
            (x, figures["tok_per_s"]),
            fontsize=8,
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=html.TUNED,
            fontweight="bold",
        )
    _budget_line(axes, figures)
    axes.margins(x=0.45, y=0.25)
    axes.set_xlabel("GiB needed")
    axes.set_ylabel("tokens/s, predicted")
    return html.picture(figure, "plans: memory against predicted tokens per second")


def advice(figures: Figures) -> str:
    """Return a picture of what each change would need and take; empty where the run fits."""
    rows = figures["advice"]
    if not rows:
        return ""
    figure, axes = html.new_figure(6.8, 0.8 + 0.42 * len(rows))
    for place, row in enumerate(reversed(rows)):
        size = row["peak_bytes"] / GIB
        axes.barh(place, size, color=FITS if row["fits"] else FITS_NOT, height=0.7)
        seconds = row["seconds_per_update"]
        time = f", {format_seconds(seconds)} an update" if seconds else ""
        end = max(size, figures["host"]["budget_bytes"] / GIB)  # clear of the budget's line
        axes.annotate(f" {size:.1f} GiB{time}", (end, place), va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [row["setting"] for row in reversed(rows)], fontsize=7.5)
    _budget_line(axes, figures)
    axes.margins(x=0.35)
    axes.set_xlabel("GiB needed with this change; blue: it fits")
    return html.picture(figure, "changes that would help, against the budget")
