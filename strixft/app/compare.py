"""Two or more runs side by side: the differences of their recipes, and their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.recipe.load import flatten
from strixft.run.folder import Result, Run
from strixft.support import html
from strixft.support.units import format_gib, format_number, format_seconds

MISSING = "–"


def _figures(run: Run, stage: str) -> dict[str, Any]:
    result = Result.load(run.stage_folder(stage))
    return result.figures if result else {}


@dataclass(frozen=True)
class Comparison:
    """Differences between runs, and their results."""

    runs: Sequence[Run]

    def differences(self) -> list[list[str]]:
        """Return settings that differ between recipes: key, then a value for each run."""
        recipes = [flatten(run.recipe.to_dict()) for run in self.runs]
        keys = sorted({key for recipe in recipes for key in recipe})
        rows = [[key, *(str(recipe.get(key, MISSING)) for recipe in recipes)] for key in keys]
        return [row for row in rows if len(set(row[1:])) > 1]

    def results(self) -> list[list[str]]:
        """Return losses, metrics, speed and memory: name, then a value for each run."""
        columns = [dict(_results(run)) for run in self.runs]
        names = dict.fromkeys(name for column in columns for name in column)
        return [[name, *(column.get(name, MISSING) for column in columns)] for name in names]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        names = [run.name for run in self.runs]
        tables = {"differences": self.differences(), "results": self.results()}
        return {
            kind: {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
            for kind, rows in tables.items()
        }

    def _repr_html_(self) -> str:
        names = [run.name for run in self.runs]
        return (
            html.table(self.differences(), ["setting", *names])
            + html.table(self.results(), ["figure", *names])
            + self.loss_curves()
        )

    def loss_curves(self) -> str:
        """Draw the training losses of all runs in one picture."""
        figure, axes = html.new_figure()
        for run in self.runs:
            losses = _figures(run, "train").get("losses", [])
            axes.plot(range(1, len(losses) + 1), losses, linewidth=1.5, label=run.name)
        axes.set_xlabel("update")
        axes.set_ylabel("loss per trained token")
        axes.legend(frameon=False)
        return html.picture(figure, "training losses of the runs")


def _results(run: Run) -> Iterator[tuple[str, str]]:
    train, evaluated = _figures(run, "train"), _figures(run, "evaluate")
    if train:
        yield "loss, last update", format_number(train["losses"][-1])
        yield "tokens per second", format_number(train["tok_per_s"], 1)
        yield "training", format_seconds(train["train_seconds"])
        yield "peak memory", format_gib(train["peak_bytes"])
    for name, variants in evaluated.get("metrics", {}).items():
        for variant, value in variants.items():
            yield f"{name}, {variant}", format_number(value)
    if preferred := evaluated.get("judge", {}).get("tuned_preferred"):
        yield "tuned preferred by the judge", format_number(preferred["share"])
    for kind, row in _figures(run, "export").get("parity", {}).items():
        yield f"{kind}, same next token", format_number(row["top1"])
