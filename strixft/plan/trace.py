"""Record what a training step allocates and frees, and in which layer's forward or backward.

The very model and step that training builds are built on `meta`, with few layers, and run for two
updates. Each allocation is kept with its size, its part and its place in the step.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from strixft.attention.core import planned_for
from strixft.catalog.hosts import Host
from strixft.data.batches import RowShape, shape_batch
from strixft.model.adapter import decoder_layers
from strixft.model.delta_rule import INSIDE
from strixft.model.load import build
from strixft.model.packed_experts import PACKED_PRODUCT, experts_at_once
from strixft.plan.cost import (
    SHARED,
    Cost,
    OpCache,
    is_4bit_product,
    operator_cost,
    unpack_cost,
    weight_of_4bit,
)
from strixft.plan.inductor import KERNEL, made, num_compiled, planned_kernels
from strixft.plan.inside import look_inside
from strixft.probe.job import Job
from strixft.step.memory_tracker import MemoryTracker, is_counted
from strixft.step.update import TrainingStep, token_losses
from strixft.support.private_torch import CHECK_OF_FUSED_ADAM, call_of, set_call, storage_key

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Place:
    """An event's place in the training."""

    micro_batch: int
    """Counted over all updates."""
    phase: Literal["load", "before", "forward", "head", "backward", "update"]
    layer: int | None = None
    """Decoder layer, in forward and backward."""


@dataclass(slots=True)
class Storage:
    """A block of memory."""

    num_bytes: int
    """As requested, not rounded to the allocator's block."""
    part: str
    born: Place
    died: Place | None = None


Segment = tuple[Place, list[int]]
"""A place, and the changes there up to the next place's turn."""


@dataclass
class Trace:
    """Allocations and frees of a training step, in order."""

    num_layers: int
    storages: list[Storage] = field(default_factory=list)
    events: list[tuple[Place, int]] = field(default_factory=list)
    """Changes: the index of a storage that is allocated, `~index` where it is freed."""
    work: list[tuple[Place, Cost]] = field(default_factory=list)
    """Cost of each operator, in order."""

    def is_like(self, other: Trace) -> bool:
        """Return whether another trace has the same events and operators, of whatever sizes."""
        ours, theirs = (
            (t.events, [(place, len(c.moved), c.dtype) for place, c in t.work])
            for t in (self, other)
        )
        return ours == theirs

    @cached_property
    def segments(self) -> list[Segment]:
        """The events, place by place, once they are recorded."""
        groups = groupby(self.events, key=lambda event: event[0])
        return [(place, [change for _, change in events]) for place, events in groups]

    @cached_property
    def work_places(self) -> tuple[list[Place], npt.NDArray[np.int64]]:
        """Places of the work, and for each piece of it the place's number."""
        numbers: dict[Place, int] = {}
        found = [numbers.setdefault(place, len(numbers)) for place, _ in self.work]
        return list(numbers), np.array(found, dtype=np.int64)


def one_step(trace: Trace) -> Trace:
    """Make a trace of updates of one micro-batch from one whose second update has two."""
    last = max(place.micro_batch for place, _ in trace.events)
    update = Place(last, "update")

    def is_gone(place: Place) -> bool:
        return place.micro_batch == last and place != update

    storages = trace.storages
    events = [(at, n) for at, n in trace.events if not is_gone(storages[max(n, ~n)].born)]
    moved = {update: Place(last - 1, "update")}
    work = [
        (Place(0, "load") if is_gone(place) else moved.get(place, place), cost)
        for place, cost in trace.work
    ]
    return replace(trace, events=events, work=work)


class _Recorder(MemoryTracker):
    """A tracker that writes a trace, and answers what `meta` tensors cannot."""

    def __init__(self, num_layers: int, host: Host, op_cache: OpCache) -> None:
        super().__init__()
        self.trace = Trace(num_layers)
        self._op_cache = op_cache
        self._on_gpu = host.device == "cuda"
        self.place = Place(0, "load")
        self._index: dict[int, int] = {}
        self._leaves_layers = False
        self.ended = False

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1  # transformers asks of position ids whether rows are packed; they are not
        if func is aten._fused_adamw_.default:  # works in place, on five lists of tensors
            self.trace.work.append((self.place, operator_cost(func, args, kwargs, args[0])))
            return None
        if func is KERNEL:
            self.trace.work.append((self.place, made[args[0]].cost))
            return func(*args)
        if func in INSIDE:
            return self._run_program(func, args, kwargs)
        if is_4bit_product(func) and self._on_gpu:
            return self._run_4bit_product(func, args, kwargs)
        if func is PACKED_PRODUCT:
            return self._run_packed_product(func, args, kwargs)
        if func is aten.add.Tensor and self._adds_embedding_gradient(args):
            return super().run(func, args, kwargs)
        return self._counted(func, args, kwargs)

    def _counted(self, func: Any, args: Any, kwargs: Any) -> Any:
        result, cost = self._op_cache.run(func, args, kwargs, super().run)
        if is_counted():  # what stays inside a kernel costs nothing beside what the kernel moves
            self.trace.work.append((self.place, cost))
        return result

    def _run_4bit_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count the whole weight, (rows, columns), that it writes out inside, unseen by a tracker.

        Source: bitsandbytes 0.50.2, backends/cuda/ops.py, `_dequant_linear_fallback`.
        """
        weight = torch.empty(weight_of_4bit(args), dtype=args[0].dtype, device="meta")
        self.watch(weight, "workspace")
        self.trace.work.append((self.place, unpack_cost(args[1], weight)))
        return self._counted(func, args, kwargs)

    def _run_packed_product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count the experts that it writes out at once, and the work of writing them all."""
        _, tensors, ends, shape, transposed, kind = args
        step = experts_at_once(shape, args[0].dtype)
        weights = torch.empty(step, *shape[1:], dtype=args[0].dtype, device="meta")
        numbers = weights.shape[1:].numel()  # what is written out beside, for a moment
        beside = 2 * numbers if kind == "mxfp4" else numbers // 8
        scratch = torch.empty(step * beside, dtype=torch.uint8, device="meta")
        self.watch(weights, "workspace")
        self.watch(scratch, "workspace")
        whole = torch.empty(shape, dtype=args[0].dtype, device="meta")
        self.trace.work.append((self.place, unpack_cost(tensors[0], whole)))
        product = torch.ops.strixft.grouped_product.default
        return self._counted(product, (args[0], whole.mT if transposed else whole, ends), {})

    def _run_program(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count what an operator of our own allocates inside, unseen by a tracker."""
        inside = look_inside(func, args)
        work = torch.empty(inside.peak_bytes, dtype=torch.uint8, device="meta")
        self.watch(work, "workspace")
        result, _ = self._op_cache.run(func, args, kwargs, super().run)
        self.trace.work.append((self.place, inside.cost))
        return result

    def watch_model(self, model: nn.Module) -> None:
        for index, layer in enumerate(decoder_layers(model)):
            self.place = Place(0, "load", index)
            super().watch_model(layer)
        self.place = Place(0, "load")
        super().watch_model(model)

    def assign_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note which layer each state of the optimiser belongs to."""
        for index, layer in enumerate(decoder_layers(model)):
            for parameter in layer.parameters():
                states = optimizer.state.get(parameter, {}).values()
                for state in (state for state in states if isinstance(state, Tensor)):
                    storage = self.trace.storages[self._index[storage_key(state)]]
                    storage.born = replace(storage.born, layer=index)

    def watch(self, tensor: Tensor, name: str) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        known = self._index.get(key)
        super().watch(tensor, name)
        if known is not None:
            self.trace.storages[known].part = name
            return
        if self._leaves_layers:  # what is freed up to here still belongs to the last layer
            self._goto("head")
            self._leaves_layers = False
        self._index[key] = len(self.trace.storages)
        self.trace.events.append((self.place, len(self.trace.storages)))
        self.trace.storages.append(Storage(storage.nbytes(), name, self.place))

    def _free(self, key: int) -> None:
        super()._free(key)
        if self.ended:  # the model itself goes
            return
        index = self._index.pop(key)
        self.trace.storages[index].died = self.place
        self.trace.events.append((self.place, ~index))

    def follow(self, layers: nn.ModuleList) -> None:
        """Note when each layer begins and ends, forward and backward."""
        for index, layer in enumerate(layers):
            self._follow(index, layer, last=index == len(layers) - 1)

    def _follow(self, index: int, layer: Any, *, last: bool) -> None:
        """Wrap a layer's call: hooks would be compiled with the layer."""
        call = call_of(layer)

        def followed(*args: Any, **kwargs: Any) -> Any:
            again = self.place.phase == "backward"
            if not again:
                self._goto("forward", index)
            output = call(*args, **kwargs)
            if not again:
                self._leaves_layers = last
                hidden = output[0] if isinstance(output, tuple | list) else output
                if hidden.requires_grad:  # no gradient goes below the first adapter
                    hidden.register_hook(lambda _: self._goto("backward", index))
            return output

        set_call(layer, followed)

    def _goto(self, phase: Any, layer: int | None = None) -> None:
        self.place = Place(self.place.micro_batch, phase, layer)


@contextlib.contextmanager
def _instead(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _known_on_meta() -> Iterator[None]:
    """Let the fused optimiser run on `meta`."""
    adam: Any = importlib.import_module("torch.optim.adam")
    with _instead(adam, CHECK_OF_FUSED_ADAM, lambda *_, **__: None):
        yield


class _TracedStep(TrainingStep):
    """The training step, telling a recorder where it is."""

    recorder: _Recorder

    def loss(self, batch: Any, num_trained: Any) -> Tensor:
        before = self.recorder.place.micro_batch + 1
        self.recorder.place = Place(before, "before")
        return super().loss(batch, num_trained)

    def finish(self, losses: Any, before_step: Any) -> None:
        self.recorder._goto("update")
        super().finish(losses, before_step)


def trace_step(
    job: Job,
    shape: RowShape,
    recomputed_layers: int,
    steps: int,
    layers: Sequence[int] | None = None,
) -> Trace:
    """Run two updates on `meta` and record them.

    Args:
        job: What is trained, and where.
        shape: The micro-batch.
        recomputed_layers: Layers whose activations are not kept.
        steps: Micro-batches of an update; 2 stand for any more.
        layers: The layers of the model that are run; all if not given.
    """
    options = job.options_with(recomputed_layers)

    def record(op_cache: OpCache) -> Trace | None:
        """Return a trace; None if layers were compiled: the compiler makes tensors of its own."""
        before = num_compiled()
        model = build(job.recipe, "meta", job.dtype, job.config, layers)
        batch = shape_batch(shape.rows, shape.length, shape.trained, "meta", shape.packed)
        step = _TracedStep(model, job.recipe.train, options)
        recorder = step.recorder = _Recorder(len(decoder_layers(model)), job.host, op_cache)
        recorder.watch_model(model)
        recorder.follow(decoder_layers(model))
        with recorder:
            for micro_batches in (1, min(steps, 2)):  # in the second the optimiser has its state
                step.update([batch] * micro_batches)
                if num_compiled() != before:
                    recorder.ended = True
                    return None
        recorder.assign_optimizer_state(model, step.optimizer)
        recorder.ended = True
        return recorder.trace

    # all that decides how layers are compiled but the micro-batch, which the compiler guards
    alike = job.recipe.model_dump_json(), str(job.config.to_dict()), job.options
    compiling = planned_kernels(alike) if options.compiled else contextlib.nullcontext()
    with _known_on_meta(), planned_for(job.host.device), compiling:
        while True:
            is_first = options.compiled and not num_compiled()
            if (trace := record(OpCache() if is_first else SHARED)) is not None:
                return trace


def forward_bytes(job: Job, shape: RowShape, layers: Sequence[int] | None = None) -> int:
    """Return the peak of a forward pass without gradients, in bytes beside the weights.

    Args:
        job: What is trained, and where.
        shape: The batch.
        layers: Layers of the model; a few tell as much as many.
    """
    model = build(job.recipe, "meta", job.dtype, job.config, layers)
    recorder = _Recorder(len(decoder_layers(model)), job.host, SHARED)
    recorder.watch_model(model)
    before = recorder.live_bytes
    batch = shape_batch(shape.rows, shape.length, shape.trained, "meta")
    with _known_on_meta(), planned_for(job.host.device), torch.no_grad(), recorder:
        token_losses(model, batch)
    recorder.ended = True
    return recorder.peak_bytes - before
