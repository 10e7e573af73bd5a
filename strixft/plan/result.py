"""Stage `plan`: what the run needs, what the host has, and the choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from strixft import views
from strixft.errors import FitError
from strixft.guard import budget_for, find_host
from strixft.hardware import Budget, Host
from strixft.model import load_config
from strixft.plan.choose import DataShape, choose
from strixft.plan.dry_run import DryRun
from strixft.prepare import Prepared
from strixft.recipe import Recipe
from strixft.runs import Result, Run
from strixft.units import format_gib, format_number


@dataclass(frozen=True, kw_only=True)
class Plan(Result):
    """The memory-fit check and the choice that training follows."""

    name: ClassVar[str] = "plan"

    def is_final(self) -> bool:
        """A run that does not fit is planned again next time: memory may be free by then."""
        return bool(self.figures["fits"])

    def _repr_html_(self) -> str:
        figures = self.figures
        host, choice = figures["host"], figures["choice"]
        parts = [[name, format_gib(size)] for name, size in figures["parts"].items() if size]
        shown = {
            "fits": "yes" if figures["fits"] else "NO",
            "host": host["name"],
            "peak": format_gib(figures["peak_bytes"]),
            "budget": f"{format_gib(host['budget_bytes'])} ({host['source']})",
            "rows per micro-batch": choice["micro_batch_rows"],
            "micro-batches per update": choice["gradient_accumulation_steps"],
            "layers recomputed": f"{choice['recomputed_layers']} of {choice['num_layers']}",
            "updates": format_number(figures["updates"]),
        }
        return views.mapping(shown) + views.table(parts, ["part at the peak", "memory"])

    def require_fit(self) -> None:
        """Raise if the run does not fit.

        Raises:
            FitError: With what is needed, what is there, and what helps.
        """
        if self.figures["fits"]:
            return
        peak, limit = self.figures["peak_bytes"], self.figures["host"]["budget_bytes"]
        largest = max(self.figures["parts"].items(), key=lambda row: row[1])
        raise FitError(
            f"the run needs {format_gib(peak)} and {self.figures['host']['name']} has"
            f" {format_gib(limit)} for it; most of it is {largest[0]}, {format_gib(largest[1])}",
            fix="; or ".join(self.figures["advice"]),
        )


def _choice(found: DryRun, recipe: Recipe, data: DataShape) -> dict[str, Any]:
    rows = found.shape.rows
    return {
        "micro_batch_rows": rows,
        "max_length": found.shape.length,
        "recomputed_layers": found.recomputed_layers,
        "num_layers": found.num_layers,
        "gradient_accumulation_steps": max(1, round(data.rows_per_update(recipe) / rows)),
    }


def _updates(recipe: Recipe, data: DataShape, choice: dict[str, Any]) -> int | None:
    if not data.lengths:
        return None
    rows: int = choice["micro_batch_rows"] * choice["gradient_accumulation_steps"]
    return max(1, round(len(data.lengths) * recipe.train.epochs / rows))


def _advice(recipe: Recipe) -> list[str]:
    shorter = recipe.dataset.max_length // 2
    advice = [f"--set dataset.max_length={shorter}"]
    if recipe.method in ("lora", "dora", "full"):
        advice.append("--set method=qlora")
    if recipe.train.micro_batch not in ("auto", 1):
        advice.append("--set train.micro_batch=auto")
    if recipe.train.recompute not in ("auto", "all"):
        advice.append("--set train.recompute=auto")
    return advice


def _assumptions(host: Host, limit: Budget) -> list[dict[str, str]]:
    return [
        {"what": "budget", "value": str(limit.num_bytes), "source": limit.source},
        {
            "what": "attention",
            "value": "flash attention, as scaled_dot_product_attention chooses on this device",
            "source": f"assumed for {host.name}; not probed",
        },
    ]


def plan_figures(
    recipe: Recipe, host_name: str | None = None, prepared: Prepared | None = None
) -> dict[str, Any]:
    """The plan's figures.

    Args:
        recipe: What to run.
        host_name: Another host than the recipe's.
        prepared: The prepared data; without them rows are as long as `max_length`.
    """
    host = find_host(host_name or recipe.memory.host)
    limit = budget_for(recipe.memory, host)
    data = DataShape.of(recipe, prepared)
    found = choose(recipe, load_config(recipe), host, limit, data)
    choice = _choice(found, recipe, data)
    fits = found.peak_bytes <= limit.num_bytes
    return {
        "fits": fits,
        "host": {"name": host.name, "budget_bytes": limit.num_bytes, "source": limit.source},
        "peak_bytes": found.peak_bytes,
        "parts": found.parts,
        "phases": {"train": {"device_bytes": found.peak_bytes, "host_bytes": None}},
        "choice": choice,
        "tokens_per_update": data.tokens_per_update(recipe),
        "updates": _updates(recipe, data, choice),
        "tok_per_s": None,
        "seconds_per_update": None,
        "seconds_total": None,
        "assumptions": _assumptions(host, limit),
        "advice": [] if fits else _advice(recipe),
    }


def _plan(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared = run.require(Prepared)
    inputs = {"rows_sha256": prepared.inputs["rows_sha256"]}
    return inputs, plan_figures(run.recipe, prepared=prepared)


def plan_recipe(run: Run) -> Plan:
    """Plan a prepared run on its host; written to the run folder."""
    return run.once(Plan, lambda folder: _plan(run, folder))
