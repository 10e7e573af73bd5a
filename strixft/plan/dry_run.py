"""Run the training step on `meta` tensors and add up the storages alive.

The very model and step that training builds are built on `meta` and run for two updates. Nothing
is loaded, nothing is fitted to a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from strixft.attention import planned_for
from strixft.data import shape_batch
from strixft.hardware import Host
from strixft.model import build, native_dtype
from strixft.recipe import Recipe
from strixft.step import MemoryTracker, TrainingStep
from strixft.step.tracker import PARTS
from strixft.units import MIB

aten = torch.ops.aten

WORKSPACE_BYTES = {"cuda": 108 * MIB, "cpu": 0}
"""BLAS workspaces inside torch's allocator: hipBLAS 32 MiB and hipBLASLt 76 MiB, torch 2.14
aten/src/ATen/cuda/CublasHandlePool.cpp."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """A micro-batch at its largest."""

    rows: int
    """B."""
    length: int
    """T."""
    trained: int
    """K: trained tokens."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a training step keeps in memory."""

    shape: RowShape
    recomputed_layers: int
    num_layers: int
    parts: dict[str, int]
    """Bytes alive at the peak, by part."""
    resident_bytes: int
    """Bytes alive between updates."""

    @property
    def peak_bytes(self) -> int:
        """The parts, added up."""
        return sum(self.parts.values())


class _OnMeta(MemoryTracker):
    """Answers what `meta` tensors cannot."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1  # transformers asks of position ids whether rows are packed; they are not
        return func(*args, **kwargs)


def dry_run(
    recipe: Recipe, config: Any, host: Host, shape: RowShape, recomputed_layers: int = 0
) -> DryRun:
    """Two updates of the training step on `meta`; the second one has the optimiser's state.

    Args:
        recipe: Method, adapter and optimiser.
        config: The model's configuration.
        host: Decides dtype and attention operator.
        shape: The largest micro-batch.
        recomputed_layers: Layers whose activations are not kept.
    """
    model = build(recipe, "meta", native_dtype(host.device, bfloat16=host.bfloat16), config)
    step = TrainingStep(model, recipe.train, recomputed_layers=recomputed_layers)
    tracker = _OnMeta()
    tracker.watch_model(model)
    with planned_for(host.device), tracker:
        for _ in range(2):
            step.update([shape_batch(shape.rows, shape.length, shape.trained, "meta")])
    parts = {name: tracker.peak.get(name, 0) for name in PARTS}
    parts["workspace"] += WORKSPACE_BYTES[host.device]
    return DryRun(
        shape=shape,
        recomputed_layers=recomputed_layers,
        num_layers=config.get_text_config().num_hidden_layers,
        parts=parts,
        resident_bytes=tracker.live_bytes + WORKSPACE_BYTES[host.device],
    )
