"""Memory and time of a training step: its trace at full depth, without loading anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from strixft.catalog.hosts import Host
from strixft.model.architecture import architecture_of, sample_layers
from strixft.model.load import build
from strixft.plan.allocator import Replay, replay
from strixft.plan.cost import Costs, Rates, Seconds
from strixft.plan.full_depth import Ints, Kind, Schedule, rounded_all, stands_for
from strixft.plan.trace import RowShape, trace_step
from strixft.probe.job import Job
from strixft.step.tracker import PARTS, MemoryTracker
from strixft.step.update import TrainingStep
from strixft.support.errors import StageError
from strixft.support.units import format_gib


@dataclass(frozen=True, slots=True)
class DryRun:
    """Memory of a training step."""

    shape: RowShape
    recomputed_layers: int
    num_layers: int
    parts: dict[str, int]
    """Bytes at the peak, by part; `workspace` has BLAS's buffers and `unsplit_bytes`."""
    unsplit_bytes: int
    """Bytes of the allocator's blocks beyond those asked for, at the peak."""
    resident_bytes: int
    """Bytes between updates."""
    reserved_bytes: int
    """Held by the caching allocator."""
    steps: int
    """Micro-batches of an update."""
    seconds_per_update: float | None
    """Predicted time of the device; None where the host's rates are not known."""

    @property
    def peak_bytes(self) -> int:
        """The parts, added up: what torch calls allocated."""
        return sum(self.parts.values())


def layer_kinds(config: Any, recomputed_layers: int) -> list[Kind]:
    """Return for each decoder layer whether it is recomputed, and its kind in the model."""
    kinds = architecture_of(config).kinds
    return [(index < recomputed_layers, kind) for index, kind in enumerate(kinds)]


def trace_run(
    job: Job,
    shape: RowShape,
    recomputed_layers: int,
    steps: int,
    layers: Sequence[int] | None = None,
) -> Schedule:
    """Return the events at full depth; layers of one kind are traced once.

    Args:
        job: What is trained, and where.
        shape: The largest micro-batch.
        recomputed_layers: Layers whose activations are not kept.
        steps: Micro-batches of an update.
        layers: Only these of the model's layers.
    """
    known = job.architecture.kinds
    layers = range(len(known)) if layers is None else layers
    kinds = [(index < recomputed_layers, known[layer]) for index, layer in enumerate(layers)]
    sampled = sample_layers(kinds)
    recomputed = sum(index < recomputed_layers for index in sampled)
    of_model = [layers[index] for index in sampled]
    trace = trace_step(job, shape, recomputed, steps, of_model)
    return Schedule(trace, None if len(sampled) == len(kinds) else stands_for(kinds))


def require_all_weights(job: Job, run: DryRun) -> None:
    """Require that a dry run, put together from a few layers, counts the weights of all.

    Raises:
        StageError: It does not, so its peak cannot be trusted.
    """
    model = build(job.recipe, "meta", job.dtype, job.config)
    TrainingStep(model, job.recipe.train, job.options_with(run.recomputed_layers))
    tracker = MemoryTracker()
    tracker.watch_model(model)
    counted = run.parts["weights"] + run.parts["adapter"]
    if counted != tracker.live_bytes:
        raise StageError(
            f"strixft failed to plan a {job.config.model_type}: it counts {format_gib(counted)} of"
            f" weights, and all layers have {format_gib(tracker.live_bytes)}",
            fix="report it with the model's name: this says nothing against the model",
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A training step, as a plan may choose it."""

    shape: RowShape
    recomputed_layers: int
    steps: int
    """Micro-batches of an update."""


def run_schedule(
    schedule: Schedule, sizes: Ints, seconds: Seconds | None, host: Host, step: Step
) -> DryRun:
    """Return a dry run's figures.

    Args:
        schedule: Events at full depth.
        sizes: Bytes of the trace's storages, (S,).
        seconds: Of each piece of the trace's work, (W,).
        host: Its allocator and its workspace.
        step: The step that was traced.
    """
    live = schedule.live_bytes(sizes)
    until = schedule.changes[: live.argmax() + 1]  # the peak
    of_part = np.array([PARTS.index(storage.part) for storage in schedule.trace.storages])
    born, died = until[until >= 0], ~until[until < 0]
    at_peak = np.bincount(of_part[born], sizes[born], len(PARTS))
    at_peak -= np.bincount(of_part[died], sizes[died], len(PARTS))
    parts = dict(zip(PARTS, map(int, at_peak), strict=True))
    asked, workspace = int(live.max()), int(host.workspace_bytes.value)
    held = Replay(asked, asked)  # a CPU has no allocator of torch's, and holds what is asked for
    if host.device == "cuda":
        storages, events = schedule.blocks
        held = replay(sizes[storages].tolist(), events)
    parts["workspace"] += workspace + held.allocated_bytes - asked
    return DryRun(
        shape=step.shape,
        recomputed_layers=step.recomputed_layers,
        num_layers=schedule.num_layers,
        parts=parts,
        unsplit_bytes=held.allocated_bytes - asked,
        resident_bytes=int(live[-1]) + workspace,
        reserved_bytes=held.reserved_bytes + workspace,
        steps=step.steps,
        seconds_per_update=schedule.seconds_per_update(sizes, seconds, step.steps),
    )


def dry_run(
    job: Job,
    shape: RowShape,
    recomputed_layers: int = 0,
    steps: int = 1,
    layers: Sequence[int] | None = None,
) -> DryRun:
    """Run two updates of the training step on `meta`; see `trace_run` for the arguments."""
    schedule = trace_run(job, shape, recomputed_layers, steps, layers)
    sizes = rounded_all(np.array([s.num_bytes for s in schedule.trace.storages]))
    seconds = Costs.of([cost for _, cost in schedule.trace.work]).seconds(Rates.of(job.host))
    return run_schedule(schedule, sizes, seconds, job.host, Step(shape, recomputed_layers, steps))
