"""What would make a run fit, each change with the memory and time it would give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from strixft.catalog.hosts import Budget
from strixft.catalog.methods import METHODS
from strixft.plan.choose import Choice, Planner
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun
from strixft.plan.phases import outside_layers_bytes
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError
from strixft.support.units import format_gib

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


def advise(job: Job, budget_bytes: int, data: DataShape) -> list[Advice]:
    """Changes that help, those that fit first, the fastest of them first."""
    found = []
    for change, changed in _changes(job.recipe):
        length = min(data.max_length, changed.dataset.max_length)
        shape = DataShape(length, longest=min(data.longest, length))
        planner = Planner(job.with_recipe(changed), shape)
        run = planner.dry_run(1, planner.num_layers)
        need = planner.need_bytes(run)
        fits = need <= budget_bytes
        found.append(Advice(change, need, run.seconds_per_update, fits))
    return sorted(found, key=lambda row: (not row.fits, row.seconds_per_update or 0))


Way = Literal["ddp", "fsdp"]

SHARDED = ("weights", "adapter", "gradients", "optimizer")

WHOLE_LAYERS = 2
"""The one that is computed and the next."""

MOST_BOXES = 64


@dataclass(frozen=True, slots=True)
class Share:
    """What each machine holds and does."""

    way: Way
    fits: bool
    device_bytes: int
    """Reserved, and outside the allocator."""
    parts: dict[str, int]
    """Of the peak; `gathered` is what is held whole for a while."""
    micro_batch_rows: int
    gradient_accumulation_steps: int
    recomputed_layers: int
    compute_seconds_per_update: float | None
    sent_bytes_per_update: int
    communication_seconds_per_update: None
    """Not known: no link between two such machines is measured."""


@dataclass(frozen=True, slots=True)
class _Model:
    """Sizes that sharding depends on."""

    layer_bytes: int
    outside_bytes: int
    """Embedding, last norm, head."""

    @classmethod
    def of(cls, run: DryRun, job: Job) -> _Model:
        outside = outside_layers_bytes(job)
        weights = run.parts["weights"] + run.parts["adapter"]
        return cls((weights - outside) // run.num_layers, outside)

    @property
    def gathered_bytes(self) -> int:
        return WHOLE_LAYERS * self.layer_bytes + self.outside_bytes


def _share_of(recipe: Recipe, data: DataShape, boxes: int) -> Recipe:
    """The recipe of one machine: its share of an update's tokens."""
    tokens = max(1, data.tokens_per_update(recipe) // boxes)
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"tokens_per_update": tokens})}
    )


def _saved_bytes(run: DryRun, model: _Model, boxes: int) -> int:
    """What a machine need not hold under FSDP2."""
    sharded = sum(run.parts[name] for name in SHARDED)
    return sharded - sharded // boxes - model.gathered_bytes


def _fsdp_parts(run: DryRun, model: _Model, boxes: int) -> dict[str, int]:
    parts = {n: size // boxes if n in SHARDED else size for n, size in run.parts.items()}
    return {**parts, "gathered": model.gathered_bytes}


def _sent_bytes(way: Way, run: DryRun, boxes: int) -> int:
    """Bytes that a machine sends for one update."""
    gradients = run.parts["adapter"]  # as many bytes as what is trained
    if way == "ddp":
        return 2 * gradients * (boxes - 1) // boxes
    gathered = 2 * (run.parts["weights"] + run.parts["adapter"]) + gradients
    return run.steps * gathered * (boxes - 1) // boxes


def _share(
    way: Way, choice: Choice, saved: int, parts: dict[str, int], planner: Planner, boxes: int
) -> Share:
    run = choice.run
    return Share(
        way=way,
        fits=choice.fits,
        device_bytes=planner.need_bytes(run) - saved,
        parts=parts,
        micro_batch_rows=run.shape.rows,
        gradient_accumulation_steps=run.steps,
        recomputed_layers=run.recomputed_layers,
        compute_seconds_per_update=run.seconds_per_update,
        sent_bytes_per_update=_sent_bytes(way, run, boxes),
        communication_seconds_per_update=None,
    )


def _shares(planner: Planner, job: Job, limit: Budget, boxes: int) -> Iterator[Share]:
    alone = planner.choose(limit)
    yield _share("ddp", alone, 0, alone.run.parts, planner, boxes)
    model = _Model.of(alone.run, job)
    saved = _saved_bytes(alone.run, model, boxes)
    roomier = planner.choose(Budget(limit.num_bytes + saved, limit.source))
    parts = _fsdp_parts(roomier.run, model, boxes)
    saved = _saved_bytes(roomier.run, model, boxes)
    yield _share("fsdp", roomier, saved, parts, planner, boxes)


def share_figures(job: Job, limit: Budget, data: DataShape, boxes: int) -> dict[str, Any]:
    """What each of several machines holds.

    Args:
        job: What to run, on each machine.
        limit: What a run may use on each.
        data: Lengths of the rows.
        boxes: Machines.

    Raises:
        RecipeError: Not a number of machines.
    """
    if not 2 <= boxes <= MOST_BOXES:
        raise RecipeError(f"--boxes should be 2 to {MOST_BOXES}, it is {boxes}", fix="--boxes 2")
    planner = Planner(job.with_recipe(_share_of(job.recipe, data, boxes)), data)
    shares = _shares(planner, job, limit, boxes)
    return {"count": boxes, "shares": [asdict(share) for share in shares]}
