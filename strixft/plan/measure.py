"""`--measure`: updates of two small real models on this device, extended to full depth.

The models have 2 and 4 layers of the planned shape, and random weights made on the device: memory
and time do not depend on them. What a layer takes beyond the dry run counts for each layer, what
both take beyond it counts once.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strixft.catalog.device_rates import device_name
from strixft.catalog.hosts import Budget
from strixft.data.batches import Batch, RowShape, shape_batch
from strixft.guard.host import cap
from strixft.model.load import random_model
from strixft.plan import trace_cache
from strixft.plan.dry_run import DryRun, dry_run
from strixft.probe.job import Job
from strixft.step.memory_tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep
from strixft.support.errors import FitError, HostError
from strixft.support.files import cache_folder, write_json
from strixft.support.units import format_gib

LAYERS = (2, 4)

WARM = 2
"""Updates that are not timed: they compile, and make the optimiser's state."""

TIMED = 3

FOLDER = "measured"

SOURCE = "strixft plan --measure, models of {layers} layers, {when}"


@dataclass(frozen=True, slots=True)
class Line:
    """Measured = `factor` × predicted + `offset`."""

    factor: float
    offset: float

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Draw the line through two points (predicted, measured).

        Where the larger model did not take more than the smaller one, noise was larger than what
        lies between them: then the line goes through the larger one and nothing.
        """
        (x, y), (far_x, far_y) = small, large
        if far_x <= x or far_y <= y:
            return cls(far_y / far_x, 0.0)
        factor = (far_y - y) / (far_x - x)
        return cls(factor, y - factor * x)

    def at(self, predicted: float, times: int = 1) -> float:
        """Return what would be measured, with `times` the offset."""
        return self.factor * predicted + self.offset * times


@dataclass(frozen=True, slots=True)
class Correction:
    """Corrects a dry run. Memory is never corrected to less: a plan must not promise too much."""

    peak: Line | None = None
    """Bytes allocated; None where the device has no allocator to ask."""
    seconds: Line | None = None
    """Time of an update of one micro-batch; None where no time is predicted."""
    source: str = ""

    def bytes_more(self, peak_bytes: int) -> int:
        """Return the bytes that the peak is higher than predicted."""
        return max(0, round(self.peak.at(peak_bytes)) - peak_bytes) if self.peak else 0

    def time(self, seconds: float | None, steps: int) -> float | None:
        """Return the seconds of an update of so many micro-batches."""
        if seconds is None or self.seconds is None:
            return seconds
        return max(self.seconds.at(seconds, steps), 0.0)

    def of_run(self, run: DryRun) -> DryRun:
        """Return a dry run, corrected; what the peak is higher stands under `workspace`."""
        more = self.bytes_more(run.peak_bytes)
        seconds, forward = self.time(run.seconds_per_update, run.steps), run.forward_seconds
        if forward is not None and run.seconds_per_update and seconds is not None:
            forward *= seconds / run.seconds_per_update
        return replace(
            run,
            parts={**run.parts, "workspace": run.parts["workspace"] + more},
            reserved_bytes=run.reserved_bytes + more,
            seconds_per_update=seconds,
            forward_seconds=forward,
        )

    def assumptions(self) -> list[dict[str, Any]]:
        """Return rows of a plan's assumptions."""
        lines = {"peak in bytes": self.peak, "seconds per micro-batch": self.seconds}
        return [
            {
                "what": f"{name}, measured = factor × predicted + offset",
                "value": f"{line.factor:.4f}, {line.offset:.4g}",
                "mark": "measured",
                "source": self.source,
            }
            for name, line in lines.items()
            if line is not None
        ]


def _real_batch(shape: RowShape, vocabulary: int, device: str) -> Batch:
    batch = shape_batch(shape.rows, shape.length, shape.trained, device, shape.packed)
    batch["input_ids"].random_(0, vocabulary)
    if shape.packed is not None:
        ends = torch.linspace(0, shape.rows * shape.length, shape.packed.documents + 1)
        batch["cu_seq_lens"] = ends.to(device, torch.int32)
    return batch


def _run(
    job: Job, shape: RowShape, recomputed_layers: int, layers: Sequence[int]
) -> tuple[int | None, float]:
    """Return the peak in bytes, where the device counts it, and the seconds of an update."""
    device = job.host.device
    model = random_model(job.recipe, job.config, device, job.dtype, layers)
    step = TrainingStep(model, job.recipe.train, job.options_with(recomputed_layers))
    batch = _real_batch(shape, job.config.get_text_config().vocab_size, device)

    def seconds() -> float:
        start = time.perf_counter()
        step.update([batch])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    median = statistics.median([seconds() for _ in range(WARM + TIMED)][WARM:])
    if device == "cpu":
        return None, median
    with peak_memory(step.model) as memory:
        step.update([batch])
    return memory["peak_bytes"], median


def _compare(
    job: Job, limit: Budget, run: DryRun, num_layers: int
) -> tuple[DryRun, int | None, float]:
    """Return a model of so many layers as predicted, its measured peak and seconds."""
    layers = [round(layer) for layer in np.linspace(0, run.num_layers - 1, num_layers)]
    recomputed = round(num_layers * run.recomputed_layers / run.num_layers)
    planned = dry_run(job, run.shape, recomputed, layers=layers)
    need = planned.reserved_bytes + int(job.host.outside_bytes.value)
    if need > limit.num_bytes:
        raise FitError(
            f"measuring with {num_layers} layers needs {format_gib(need)} and {job.host.name}"
            f" has {format_gib(limit.num_bytes)} for it",
            fix="--set train.micro_batch=1",
            settings={"train.micro_batch": 1},
        )
    cap(limit.num_bytes, planned.reserved_bytes)
    found = _run(job, run.shape, recomputed, layers)
    release_memory()  # the next model is not to find this one's memory taken
    return planned, *found


def measure(job: Job, limit: Budget, run: DryRun) -> Correction:
    """Run small models of a planned step on this device, and return how far the plan is off.

    Args:
        job: What is trained, on this machine.
        limit: Memory that the process may use; on a GPU it is held to it.
        run: The planned step.

    Raises:
        FitError: Not even the small models fit.
        HostError: There is nothing to compare: no allocator, and no predicted time.
    """
    everywhere = job.recipe.lora.model_copy(update={"layers": "all"})  # few layers may have none
    job = replace(job, recipe=job.recipe.model_copy(update={"lora": everywhere}))
    counts = [min(count, run.num_layers) for count in LAYERS]
    found = [_compare(job, limit, run, count) for count in counts]
    peaks = [(float(planned.peak_bytes), float(peak)) for planned, peak, _ in found if peak]
    times = [
        (planned.seconds_per_update, seconds)
        for planned, _, seconds in found
        if planned.seconds_per_update
    ]
    if not peaks and not times:
        raise HostError(
            f"{job.host.name} has no allocator to ask, and no rates that time is predicted with",
            fix="strixft bench bandwidth --host-row; strixft bench gemm --host-row",
        )
    layers = " and ".join(map(str, counts))
    return Correction(
        Line.through(*peaks) if peaks else None,
        Line.through(*times) if times else None,
        SOURCE.format(layers=layers, when=date.today()),
    )


def _path(job: Job) -> Path:
    name = trace_cache.name_of(job, "measured", [job.host.name, device_name(job.host)])
    return cache_folder() / FOLDER / f"{name}.json"


def save_correction(job: Job, correction: Correction) -> Path:
    """Keep a correction for all plans of such a step on this device."""
    path = _path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(correction))
    return path


def load_correction(job: Job) -> Correction:
    """Return what was measured for such a step; nothing, if nothing was or a file is damaged."""
    try:
        data = json.loads(_path(job).read_text(encoding="utf-8"))
        lines = {n: Line(**data[n]) if data[n] else None for n in ("peak", "seconds")}
        return Correction(**lines, source=data["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return Correction()
