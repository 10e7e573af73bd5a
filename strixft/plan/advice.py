"""Changes that would make a run fit, and what each of several machines would hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from strixft.catalog.hosts import Budget
from strixft.catalog.methods import METHODS
from strixft.model.config import is_in_mxfp4
from strixft.plan.choose import Choice, DataShape, Planner
from strixft.plan.dry_run import DryRun
from strixft.plan.phase_peaks import outside_layers_bytes
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError
from strixft.support.units import format_gib

SMALLEST = {"train.micro_batch": 1, "train.recompute": "all"}
"""The settings that take the least memory and change no result."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One change of the recipe and the least that it would need."""

    change: str
    """The options to type."""
    setting: str
    """The first of them, such as `method=qlora`."""
    settings: dict[str, Any]
    """All of them, by dotted key."""
    peak_bytes: int
    seconds_per_update: float | None
    fits: bool


def _with(recipe: Recipe, section: str, **settings: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})


def _changes(recipe: Recipe, config: Any) -> Iterator[tuple[str, Any, Recipe]]:
    """Yield keys and values, each with the recipe that they and `SMALLEST` give."""
    smallest = _with(recipe, "train", micro_batch=1, recompute="all")
    yield "train.micro_batch", 1, smallest
    length = recipe.dataset.max_length // 2
    shorter = _with(smallest, "dataset", max_length=length)
    yield "dataset.max_length", length, shorter
    method = METHODS[recipe.method]
    lighter = {"native": ("qlora", "int8-lora"), "int8": ("qlora",), "nf4": ()}[method.base]
    if is_in_mxfp4(config):
        lighter = tuple(name for name in lighter if METHODS[name].base == "nf4")
    for name in (*(("lora",) if method.adapter == "none" else ()), *lighter):
        changed = smallest.model_copy(update={"method": name})
        yield "method", name, changed
    if method.adapter != "none" and recipe.lora.experts == "all":
        yield "lora.experts", "shared", _with(smallest, "lora", experts="shared")
    if method.adapter != "none" and recipe.lora.r > 4:
        rank = recipe.lora.r // 4
        yield "lora.r", rank, _with(smallest, "lora", r=rank)


def cause(parts: Mapping[str, int], budget_bytes: int) -> str:
    """Return a sentence on the part of the peak that is too much."""
    name, size = max(parts.items(), key=lambda row: row[1])
    if size > budget_bytes:
        return f"{name} alone take {format_gib(size)}, more than there is"
    return f"most of it is {name}, {format_gib(size)}"


def advise(job: Job, budget_bytes: int, data: DataShape) -> list[Advice]:
    """Return changes that help, those that fit first, the fastest of them first."""
    found = []
    for key, value, changed in _changes(job.recipe, job.config):
        length = min(data.max_length, changed.dataset.max_length)
        shape = DataShape(length, longest=min(data.longest, length))
        planner = Planner(job.with_recipe(changed), shape)
        run = planner.dry_run(1, planner.num_layers)
        need = planner.need_bytes(run)
        settings = {key: value, **SMALLEST}
        change = " ".join(f"--set {name}={wanted}" for name, wanted in settings.items())
        fits, setting = need <= budget_bytes, f"{key}={value}"
        found.append(Advice(change, setting, settings, need, run.seconds_per_update, fits))
    return sorted(found, key=lambda row: (not row.fits, row.seconds_per_update or 0))


Way = Literal["ddp", "fsdp"]

SHARDED = ("weights", "adapter", "gradients", "optimizer")

WHOLE_LAYERS = 2
"""The one that is computed and the next."""

MOST_BOXES = 64


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a run that each machine holds and does."""

    way: Way
    fits: bool
    device_bytes: int
    """Reserved, and outside the allocator."""
    parts: dict[str, int]
    """Parts of the peak; `gathered` is held whole for a while."""
    micro_batch_rows: int
    gradient_accumulation_steps: int
    recomputed_layers: int
    compute_seconds_per_update: float | None
    sent_bytes_per_update: int
    communication_seconds_per_update: None = None
    """Not known: no link between two such machines is measured."""


def share_figures(job: Job, limit: Budget, data: DataShape, boxes: int) -> dict[str, Any]:
    """Return figures of a run on several machines: where each holds all, and where FSDP2 shards.

    Args:
        job: What runs on each machine.
        limit: What a run may use on each.
        data: Lengths of the rows.
        boxes: Machines; each does its share of an update's tokens.

    Raises:
        RecipeError: There cannot be so many machines.
    """
    if not 2 <= boxes <= MOST_BOXES:
        raise RecipeError(f"--boxes should be 2 to {MOST_BOXES}, it is {boxes}", fix="--boxes 2")
    tokens = max(1, data.tokens_per_update(job.recipe) // boxes)
    own = _with(job.recipe, "train", tokens_per_update=tokens)
    planner = Planner(job.with_recipe(own), data)
    alone = planner.choose(limit)
    # FSDP2 holds some layers whole, and embedding, last norm and head
    held = alone.run.parts["weights"] + alone.run.parts["adapter"]
    outside = outside_layers_bytes(job)
    gathered = WHOLE_LAYERS * ((held - outside) // alone.run.num_layers) + outside

    def saved(run: DryRun) -> int:
        sharded = sum(run.parts[name] for name in SHARDED)
        return sharded - sharded // boxes - gathered

    def share(way: Way, choice: Choice) -> dict[str, Any]:
        run = choice.run
        whole, gradients = run.parts["weights"] + run.parts["adapter"], run.parts["adapter"]
        parts, less, sent = run.parts, 0, 2 * gradients  # as many bytes as what is trained
        if way == "fsdp":
            parts = {n: s // boxes if n in SHARDED else s for n, s in parts.items()}
            parts["gathered"], less = gathered, saved(run)
            sent = run.steps * (2 * whole + gradients)
        return asdict(
            Share(
                way=way,
                fits=choice.fits,
                device_bytes=planner.need_bytes(run) - less,
                parts=parts,
                micro_batch_rows=run.shape.rows,
                gradient_accumulation_steps=run.steps,
                recomputed_layers=run.recomputed_layers,
                compute_seconds_per_update=run.seconds_per_update,
                sent_bytes_per_update=sent * (boxes - 1) // boxes,
            )
        )

    roomier = planner.choose(Budget(limit.num_bytes + saved(alone.run), limit.source))
    return {"count": boxes, "shares": [share("ddp", alone), share("fsdp", roomier)]}
