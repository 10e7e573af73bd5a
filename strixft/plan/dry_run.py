"""What a training step keeps in memory: its trace, at full depth, without loading anything."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strixft.hardware import Host
from strixft.plan.allocator import Replay, replay
from strixft.plan.stack import Kind, sample_layers, stack_layers
from strixft.plan.trace import RowShape, Trace, trace_step
from strixft.recipe import Recipe
from strixft.step.tracker import PARTS


@dataclass(frozen=True, slots=True)
class DryRun:
    """Memory of a training step."""

    shape: RowShape
    recomputed_layers: int
    num_layers: int
    parts: dict[str, int]
    """Bytes at the peak, by part; `workspace` has BLAS's buffers and what the allocator's blocks
    are larger than asked for."""
    resident_bytes: int
    """Bytes between updates."""
    reserved_bytes: int
    """What the caching allocator holds for it."""
    steps: int
    """Micro-batches of an update."""
    seconds_per_update: float | None
    """Predicted time of the device; None where the host's rates are not known."""

    @property
    def peak_bytes(self) -> int:
        """The parts, added up: what torch calls allocated."""
        return sum(self.parts.values())


def _layer_kinds(config: Any, recomputed_layers: int) -> list[Kind]:
    """What tells one decoder layer from another."""
    lists = [value for value in vars(config).values() if isinstance(value, list)]
    num_layers = config.num_hidden_layers
    per_layer = [value for value in lists if len(value) == num_layers]
    return [
        (index < recomputed_layers, *(str(value[index]) for value in per_layer))
        for index in range(num_layers)
    ]


def _with_layers(config: Any, layers: Sequence[int]) -> Any:
    """A configuration that has only these layers."""
    small = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[layer] for layer in layers])
    small.num_hidden_layers = len(layers)
    return small


def trace_run(
    recipe: Recipe, config: Any, host: Host, shape: RowShape, recomputed_layers: int, steps: int
) -> Trace:
    """The trace at full depth; layers of one kind are traced once.

    Args:
        recipe: Method, adapter and optimiser.
        config: The model's configuration.
        host: Decides dtype and attention operator.
        shape: The largest micro-batch.
        recomputed_layers: Layers whose activations are not kept.
        steps: Micro-batches of an update.
    """
    config = config.get_text_config()
    kinds = _layer_kinds(config, recomputed_layers)
    sampled = sample_layers(kinds)
    if len(sampled) >= len(kinds):
        return trace_step(recipe, config, host, shape, recomputed_layers, steps)
    recomputed = sum(layer < recomputed_layers for layer in sampled)
    small = _with_layers(config, sampled)
    trace = trace_step(recipe, small, host, shape, recomputed, steps)
    return stack_layers(trace, sampled, kinds)


def _at_peak(trace: Trace) -> tuple[dict[str, int], int]:
    """Bytes by part at the peak, and bytes alive at the end."""
    sizes = [storage.size for storage in trace.storages]
    live = peak = peak_event = 0
    for event, (_, index, born) in enumerate(trace.events):
        live += sizes[index] if born else -sizes[index]
        if live > peak:
            peak, peak_event = live, event
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for _, index, born in trace.events[: peak_event + 1]:
        parts[trace.storages[index].part] += sizes[index] if born else -sizes[index]
    return dict(parts), live


def dry_run(
    recipe: Recipe,
    config: Any,
    host: Host,
    shape: RowShape,
    recomputed_layers: int = 0,
    steps: int = 1,
) -> DryRun:
    """Two updates of the training step on `meta`; see `trace_run` for the arguments."""
    trace = trace_run(recipe, config, host, shape, recomputed_layers, steps)
    parts, resident = _at_peak(trace)
    workspace = int(host.workspace_bytes.value)
    asked = sum(parts.values())
    held = replay(trace) if host.device == "cuda" else Replay(asked, asked)
    parts["workspace"] += workspace + held.allocated_bytes - asked
    return DryRun(
        shape=shape,
        recomputed_layers=recomputed_layers,
        num_layers=config.get_text_config().num_hidden_layers,
        parts=parts,
        resident_bytes=resident + workspace,
        reserved_bytes=held.reserved_bytes + workspace,
        steps=steps,
        seconds_per_update=trace.seconds_per_update(steps),
    )
