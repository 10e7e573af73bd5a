"""Show an evaluation as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from strixft.evaluate.experts import says
from strixft.evaluate.variants import VARIANTS
from strixft.support import html
from strixft.support.units import format_number

SHOWN_ANSWERS = 8

COMPARED = [*VARIANTS, "change, 95 % interval"]


def page(figures: Mapping[str, Any]) -> str:
    """Return measures, general texts, tasks, prompts, answers and the worst rows as HTML."""
    changes, because = figures.get("changes", {}), figures.get("metrics_because")
    measures = [
        [name, *_compared(values, changes.get(name))] for name, values in figures["metrics"].items()
    ]
    markup = "".join(map(html.warning, figures.get("warnings", [])))
    markup += html.table(measures, ["measure", *COMPARED])
    if weights := figures.get("weights"):
        markup += html.note(f"The tuned model has the {weights} weights.")
    if because:
        markup += html.note(f"Measures that suit the held-out answers: {'; '.join(because)}.")
    if general := figures.get("general"):
        markup += html.note(
            f"general_loss: {general['tokens']} tokens of {general['texts']} short texts that have"
            " nothing to do with the data. A rise means that something was forgotten:"
        )
        rows = [[kind, *_compared(values)] for kind, values in general["kinds"].items()]
        markup += html.table(rows, ["general texts", *VARIANTS])
    markup += "".join(map(html.note, says(figures.get("experts", []))))
    tasks = [
        [row["task"], row["metric"], row["rows"], *_compared(row, row["change"])]
        for row in figures.get("tasks", [])
    ]
    markup += html.table(tasks, ["lm-eval task", "metric", "rows", *COMPARED]) if tasks else ""
    if prompts := figures.get("prompts"):
        markup += _texts(prompts, {"your prompt": "prompt"})
    shown = {"row": "row", "request": "request", "reference": "reference"}
    markup += _texts(figures["answers"][:SHOWN_ANSWERS], shown)
    if worst := figures.get("worst"):
        worse = f"{figures['rows_worse']} of {figures['rows_loss']} rows"
        markup += html.note(f"{worse} got a higher loss; the worst:")
        losses = [{**row, **{v: f"{row[v]:.3f}" for v in VARIANTS}} for row in worst]
        markup += _texts(losses, shown)
    return markup


def _compared(values: Mapping[str, Any], change: Mapping[str, Any] | None = None) -> list[str]:
    """Return the cells of both variants, and of their change where there is one."""
    cells = [format_number(values[variant]) for variant in VARIANTS]
    if change is None:
        return cells
    unclear = "" if change["clear"] else ", may be chance"
    interval = f"({change['low']:+.3f} to {change['high']:+.3f})"
    return [*cells, f"{change['change']:+.3f} {interval}{unclear}"]


def _texts(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return a table of columns, named header → key, and of both variants' texts."""
    cells = [[*(row[key] for key in columns.values()), *(row[v] for v in VARIANTS)] for row in rows]
    return html.table(cells, [*columns, *VARIANTS])
