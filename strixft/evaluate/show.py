"""What was evaluated as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strixft.evaluate.variants import VARIANTS
from strixft.support import html
from strixft.support.units import format_number

SHOWN_ANSWERS = 8

Figures = Mapping[str, Any]

COMPARED = [*VARIANTS, "change, 95 % interval"]


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return ""
    unclear = "" if change["clear"] else ", may be chance"
    return f"{change['change']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f}){unclear}"


def _compared(values: Mapping[str, Any], change: Mapping[str, Any] | None) -> list[str]:
    return [*(format_number(values[side]) for side in VARIANTS), _change(change)]


def _measures(figures: Figures) -> str:
    changes = figures.get("changes", {})
    rows = [
        [name, *_compared(values, changes.get(name))] for name, values in figures["metrics"].items()
    ]
    because = figures.get("metrics_because")
    told = f"Measures that the held-out answers call for: {'; '.join(because)}." if because else ""
    return html.table(rows, ["measure", *COMPARED]) + (html.note(told) if told else "")


def _general(figures: Figures) -> str:
    general = figures.get("general")
    if not general:
        return ""
    text = (
        f"general_loss: {general['tokens']} tokens of {general['texts']} short texts that have"
        " nothing to do with the data. Where it rises, something was forgotten:"
    )
    rows = [
        [kind, *(format_number(values[side]) for side in VARIANTS)]
        for kind, values in general["kinds"].items()
    ]
    return html.note(text) + html.table(rows, ["general texts", *VARIANTS])


def _tasks(figures: Figures) -> str:
    rows = [
        [row["task"], row["metric"], row["rows"], *_compared(row, row["change"])]
        for row in figures.get("tasks", [])
    ]
    return html.table(rows, ["lm-eval task", "metric", "rows", *COMPARED]) if rows else ""


def _prompts(figures: Figures) -> str:
    rows = [
        [row["prompt"], *(row[side] for side in VARIANTS)] for row in figures.get("prompts", [])
    ]
    return html.table(rows, ["your prompt", *VARIANTS]) if rows else ""


def _answers(figures: Figures) -> str:
    rows = [
        [row["row"], row["request"], row["reference"], *(row[side] for side in VARIANTS)]
        for row in figures["answers"][:SHOWN_ANSWERS]
    ]
    return html.table(rows, ["row", "request", "reference", *VARIANTS])


def _worst(figures: Figures) -> str:
    worst = figures.get("worst", [])
    if not worst:
        return ""
    rows = [
        [row["row"], row["request"], row["reference"], *(f"{row[s]:.3f}" for s in VARIANTS)]
        for row in worst
    ]
    text = f"{figures['rows_worse']} of {figures['rows_loss']} rows got a higher loss; the worst:"
    return html.note(text) + html.table(rows, ["row", "request", "reference", *VARIANTS])


def page(figures: Figures) -> str:
    """Measures, general texts, tasks, prompts, answers and the worst rows, as HTML.

    Args:
        figures: Of the stage's `result.json`; older ones have fewer of them.
    """
    parts = (_measures, _general, _tasks, _prompts, _answers, _worst)
    return "".join(map(html.warning, figures.get("warnings", []))) + "".join(
        part(figures) for part in parts
    )
