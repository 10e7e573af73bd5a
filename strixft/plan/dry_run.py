"""Memory and time of a training step, without loading anything.

Decoder layers of one kind do the same in the same order. So a trace with one layer of each kind,
between a first and a last one, holds every event of the deep model. Here they are put together
again, layer by layer, each layer with storages of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt

from strixft.catalog.hosts import Host
from strixft.data.batches import RowShape
from strixft.model.architecture import sample_layers
from strixft.model.load import build
from strixft.plan.allocator import Replay, replay
from strixft.plan.cost import Costs, Floats, Rates, Seconds
from strixft.plan.trace import Place, Segment, Trace, trace_step
from strixft.probe.job import Job
from strixft.step.memory_tracker import BLOCK, PARTS, MemoryTracker
from strixft.step.update import TrainingStep
from strixft.support.errors import StageError
from strixft.support.units import format_gib

Kind = Hashable

Ints = npt.NDArray[np.int64]


def rounded_all(num_bytes: Ints) -> Ints:
    """Return bytes of the allocator's blocks, any shape; see `memory_tracker.rounded`."""
    blocks: Ints = -(-num_bytes // BLOCK) * BLOCK
    return blocks


def stands_for(kinds: Sequence[Kind]) -> list[int]:
    """Return, for each layer of the deep model, which of `sample_layers` stands for it."""
    sampled = sample_layers(kinds)
    of_kind = {kinds[layer]: index for index, layer in enumerate(sampled[1:-1], start=1)}
    return [0, *(of_kind[kind] for kind in kinds[1:-1]), len(sampled) - 1]


class Schedule:
    """The events of a model of full depth, told by a trace's storages.

    Letters: S storages of the trace, W pieces of its work, E events of the deep model.

    Args:
        trace: Of a few layers, or of all.
        stands_for: For each layer of the deep model, the layer of the trace that stands for it;
            None where the trace is of all layers.
    """

    def __init__(self, trace: Trace, stands_for: Sequence[int] | None = None) -> None:
        self.trace = trace
        self._stands_for = range(trace.num_layers) if stands_for is None else stands_for
        self.num_layers = len(self._stands_for)
        self._copies = Counter[int | None]([None, *self._stands_for])
        """Layers of the deep model that each layer of the trace stands for."""

    @cached_property
    def _passes(self) -> list[tuple[int, Segment, int | None]]:
        """The trace's segments with the deep layers that they are repeated for, in order."""
        found: list[tuple[int, Segment, int | None]] = []
        by_pass = groupby(
            enumerate(self.trace.segments),
            key=lambda s: (s[1][0].micro_batch, s[1][0].phase, s[1][0].layer is None),
        )
        for (_, phase, is_global), group in by_pass:
            if is_global or phase == "update":
                found += [(number, segment, None) for number, segment in group]
                continue
            by_layer = defaultdict(list)
            for number, segment in group:
                by_layer[segment[0].layer].append((number, segment))
            layers = list(enumerate(self._stands_for))
            for deep, sample in reversed(layers) if phase == "backward" else layers:
                found += [(number, segment, deep) for number, segment in by_layer[sample]]
        return found

    def _events(
        self, segment: Segment, layer: int | None, *, is_last: bool
    ) -> Iterator[tuple[int, int | None]]:
        """Yield what a segment does in a deep layer.

        Args:
            segment: Of the trace.
            layer: The deep layer, None outside the layers.
            is_last: Whether no later layer repeats the segment.

        Yields:
            Each change, and the deep layer that its storage belongs to.
        """
        place, changes = segment
        for change in changes:
            owner = self.trace.storages[max(change, ~change)].born.layer
            if owner is None:
                if change >= 0 or is_last:  # a mask, say, is freed by the last layer that reads it
                    yield change, None
            elif place.phase == "update":  # gradients and optimiser state of every layer
                yield from (
                    (change, n) for n, stands in enumerate(self._stands_for) if stands == owner
                )
            elif layer is None:  # freed outside the layers
                yield change, self._last_copy[owner]
            else:  # the layer's own, or handed on by the one before or behind it
                yield change, layer + owner - self._stands_for[layer]

    @cached_property
    def _last_copy(self) -> dict[int, int]:
        """The last deep layer that each layer of the trace stands for."""
        return {sample: deep for deep, sample in enumerate(self._stands_for)}

    @cached_property
    def _last_repeat(self) -> dict[int, int | None]:
        """The deep layer that each segment is repeated for last."""
        return {number: layer for number, _, layer in self._passes}

    @cached_property
    def changes(self) -> Ints:
        """Storages in the order of their births, and `~storage` where one dies; (E,)."""
        made: dict[tuple[int, bool], Ints] = {}  # the same for every layer but the last
        pieces = []
        for number, segment, layer in self._passes:
            is_last = self._last_repeat[number] == layer
            if (number, is_last) not in made:
                events = self._events(segment, layer, is_last=is_last)
                made[number, is_last] = np.array([change for change, _ in events], dtype=np.int64)
            pieces.append(made[number, is_last])
        return np.concatenate(pieces)

    @cached_property
    def blocks(self) -> tuple[list[int], list[int]]:
        """Each block of the deep model: the storage whose size it has; and the events, (E,).

        An event is a block's number where it is allocated, `~number` where it is freed.
        """
        storages, events = list[int](), list[int]()
        alive: dict[tuple[Hashable, int | None], int] = {}
        twins = self._twins
        for number, segment, layer in self._passes:
            is_last = self._last_repeat[number] == layer
            for change, deep in self._events(segment, layer, is_last=is_last):
                index = max(change, ~change)
                key = twins.get(index, index), deep
                if change < 0:
                    events.append(~alive.pop(key))
                    continue
                alive[key] = len(storages)
                events.append(len(storages))
                storages.append(index)
        return storages, events

    @cached_property
    def fits_together(self) -> bool:
        """Each storage that is freed was allocated: layers hand on to their neighbours alone.

        Where layers share keys and values across several others, those traced do not stand for
        all.
        """
        try:
            return bool(self.blocks)
        except KeyError:
            return False

    @cached_property
    def _twins(self) -> dict[int, Hashable]:
        """Name storages that a layer hands on by their order among those.

        Whoever frees one means that of the layer beside it, which may be of another kind.
        """
        found: dict[int, Hashable] = {}
        handed_on = Counter[Place]()
        for index, storage in enumerate(self.trace.storages):
            born, died = storage.born, storage.died
            if died and None not in (born.layer, died.layer) and born.layer != died.layer:
                found[index] = born.micro_batch, born.phase, handed_on[born]
                handed_on[born] += 1
        return found

    def live_bytes(self, sizes: Ints) -> Ints:
        """Return the bytes alive after each event, (E,), where storages have these sizes, (S,)."""
        signed = np.concatenate([sizes, -sizes[::-1]])  # ~storage counts from the end
        return np.cumsum(signed[self.changes])

    def seconds_per_update(self, sizes: Ints, seconds: Seconds | None, steps: int) -> float | None:
        """Return the predicted time of an update.

        Each place takes the longer of device and launches, and the whole no less than all that the
        processor does.

        Args:
            sizes: Bytes of the trace's storages, (S,).
            seconds: Of each piece of work, (W,); None where the host's rates are not known.
            steps: Micro-batches of an update; each does what the trace's last one does.
        """
        if seconds is None:
            return None
        counts, is_update = self._counts
        more_bytes, more_tensors = self._trained_growth(sizes)
        device = np.where(is_update, more_bytes, steps * counts) * seconds.device
        launch = np.where(is_update, more_tensors, steps * counts) * seconds.launch
        return self._longer(device, launch, steps * seconds.python_s)

    def forward_seconds(self, seconds: Seconds | None) -> float | None:
        """Return the predicted time of a micro-batch's forward pass, with all that its head does.

        Args:
            seconds: Of each piece of work, (W,); None where the host's rates are not known.
        """
        if seconds is None:
            return None
        counts, _ = self._counts
        places, numbers = self.trace.work_places
        of_forward = [place.phase in ("before", "forward", "head") for place in places]
        counts = counts * np.array(of_forward, dtype=np.float64)[numbers]
        return self._longer(counts * seconds.device, counts * seconds.launch, seconds.python_s)

    def _longer(self, device: Floats, launch: Floats, python_s: float) -> float:
        """Return the time of pieces of work, (W,), that the device and the processor share."""
        places = (np.bincount(self.trace.work_places[1], each) for each in (device, launch))
        return max(float(np.maximum(*places).sum()), float(launch.sum()) + python_s)

    @cached_property
    def _counts(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Layers that do each piece of work, (W,), in the last micro-batch; the update's pieces."""
        places, numbers = self.trace.work_places
        last = max((place.micro_batch for place in places), default=0)
        of_last = [self._copies[p.layer] if p.micro_batch == last else 0 for p in places]
        updates = [p.micro_batch == last and p.phase == "update" for p in places]
        return np.array(of_last, dtype=np.float64)[numbers], np.array(updates, dtype=bool)[numbers]

    def _trained_growth(self, sizes: Ints) -> tuple[float, float]:
        """Return trained bytes of the deep model ÷ the trace's; the same for trained tensors."""
        trained = [i for i, s in enumerate(self.trace.storages) if s.part == "adapter"]
        copies = np.array([self._copies[self.trace.storages[i].born.layer] for i in trained])
        return float(sizes[trained] @ copies / sizes[trained].sum()), float(copies.mean())


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
    forward_seconds: float | None
    """That of a forward pass of one micro-batch."""

    @property
    def peak_bytes(self) -> int:
        """The parts, added up: what torch calls allocated."""
        return sum(self.parts.values())


def layer_kinds(
    job: Job, recomputed_layers: int, layers: Sequence[int] | None = None
) -> list[Kind]:
    """Return for each layer, or some, whether it is recomputed, and its kind."""
    known = job.kinds
    kept = known if layers is None else [known[layer] for layer in layers]
    return [(index < recomputed_layers, kind) for index, kind in enumerate(kept)]


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
    layers = range(len(job.kinds)) if layers is None else layers
    kinds = layer_kinds(job, recomputed_layers, layers)
    sampled = sample_layers(kinds)
    recomputed = sum(index < recomputed_layers for index in sampled)
    of_model = [layers[index] for index in sampled]
    trace = trace_step(job, shape, recomputed, steps, of_model)
    schedule = Schedule(trace, None if len(sampled) == len(kinds) else stands_for(kinds))
    if schedule.fits_together:
        return schedule
    return Schedule(trace_step(job, shape, recomputed_layers, steps, layers))


def require_all_weights(job: Job, run: DryRun) -> None:
    """Require that a dry run, put together from a few layers, counts the weights of all.

    Raises:
        StageError: It does not, so its peak cannot be trusted.
    """
    model = build(job.recipe, "meta", job.dtype, job.config)  # whole: no layer stands for another
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
        forward_seconds=schedule.forward_seconds(seconds),
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
