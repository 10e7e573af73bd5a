"""What would make a run fit, each change with the memory and time it would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from strixft.hardware import Host
from strixft.methods import METHODS
from strixft.plan.choose import Planner
from strixft.plan.data_shape import DataShape
from strixft.recipe import Recipe
from strixft.units import format_gib

Change = tuple[str, Recipe]
SMALLEST = "--set train.micro_batch=1 --set train.recompute=all"
"""What takes the least memory and changes no result."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One change of the recipe and the least that it would need."""

    change: str
    """What to type."""
    peak_bytes: int
    seconds_per_update: float | None
    fits: bool


def _with(recipe: Recipe, section: str, **settings: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})


def _changes(recipe: Recipe) -> Iterator[Change]:
    smallest = _with(recipe, "train", micro_batch=1, recompute="all")
    yield SMALLEST, smallest
    length = recipe.dataset.max_length // 2
    shorter = _with(smallest, "dataset", max_length=length)
    yield f"--set dataset.max_length={length} {SMALLEST}", shorter
    method = METHODS[recipe.method]
    lighter = {"native": ("qlora", "int8-lora"), "int8": ("qlora",), "nf4": ()}[method.base]
    for name in (*(("lora",) if method.adapter == "none" else ()), *lighter):
        changed = smallest.model_copy(update={"method": name})
        yield f"--set method={name} {SMALLEST}", changed
    if method.adapter != "none" and recipe.lora.r > 4:
        rank = recipe.lora.r // 4
        yield f"--set lora.r={rank} {SMALLEST}", _with(smallest, "lora", r=rank)


def cause(parts: Mapping[str, int], budget_bytes: int) -> str:
    """Which part of the peak is too much, in a sentence."""
    name, size = max(parts.items(), key=lambda row: row[1])
    if size > budget_bytes:
        return f"{name} alone take {format_gib(size)}, more than there is"
    return f"most of it is {name}, {format_gib(size)}"


def advise(
    recipe: Recipe, config: Any, host: Host, budget_bytes: int, data: DataShape
) -> list[Advice]:
    """Changes that help, those that fit first, the fastest of them first."""
    found = []
    for change, changed in _changes(recipe):
        length = min(data.max_length, changed.dataset.max_length)
        shape = DataShape(length, longest=min(data.longest, length))
        planner = Planner(changed, config, host, shape)
        run = planner.dry_run(1, planner.num_layers)
        need = planner.need_bytes(run)
        fits = need <= budget_bytes
        found.append(Advice(change, need, run.seconds_per_update, fits))
    return sorted(found, key=lambda row: (not row.fits, row.seconds_per_update or 0))
