"""Several machines for one run: what each holds, by DDP and by FSDP2.

Derived from the plan of one machine; neither has been run on several. Each machine does its share
of an update's rows.

*DDP* (`gradient_as_bucket_view`): each machine holds all that one machine holds. Per update it
sends and receives 2 (n − 1) / n of the gradients' bytes (ring all-reduce).

*FSDP2*, every layer sharded, resharded after forward: a machine holds one nth of weights,
gradients and optimiser, whole the layer that is computed and the one that is fetched meanwhile, and
whole what stands outside the layers. Quantised weights travel quantised. Per micro-batch the layers
are gathered twice, forward and backward, and the gradients scattered once: (n − 1) / n of the bytes
each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from strixft.errors import RecipeError
from strixft.hardware import Budget, Host
from strixft.plan.choose import Choice, Planner
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import DryRun
from strixft.plan.phases import outside_layers_bytes
from strixft.recipe import Recipe

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
    def of(cls, run: DryRun, config: Any, host: Host) -> _Model:
        outside = outside_layers_bytes(config, host)
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


def _shares(
    planner: Planner, config: Any, host: Host, limit: Budget, boxes: int
) -> Iterator[Share]:
    alone = planner.choose(limit)
    yield _share("ddp", alone, 0, alone.run.parts, planner, boxes)
    model = _Model.of(alone.run, config, host)
    saved = _saved_bytes(alone.run, model, boxes)
    roomier = planner.choose(Budget(limit.num_bytes + saved, limit.source))
    parts = _fsdp_parts(roomier.run, model, boxes)
    saved = _saved_bytes(roomier.run, model, boxes)
    yield _share("fsdp", roomier, saved, parts, planner, boxes)


def share_figures(
    recipe: Recipe, config: Any, host: Host, limit: Budget, data: DataShape, boxes: int
) -> dict[str, Any]:
    """What each of several machines holds.

    Args:
        recipe: What to run.
        config: The model's configuration.
        host: Each machine.
        limit: What a run may use on each.
        data: Lengths of the rows.
        boxes: Machines.

    Raises:
        RecipeError: Not a number of machines.
    """
    if not 2 <= boxes <= MOST_BOXES:
        raise RecipeError(f"--boxes should be 2 to {MOST_BOXES}, it is {boxes}", fix="--boxes 2")
    planner = Planner(_share_of(recipe, data, boxes), config, host, data)
    shares = _shares(planner, config, host, limit, boxes)
    return {"count": boxes, "shares": [asdict(share) for share in shares]}
