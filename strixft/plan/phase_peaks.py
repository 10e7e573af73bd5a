"""Peaks of the phases of a run: loading, training, evaluation, answers, merging, export.

Each phase is a process of its own or begins when the one before has given its memory back. The page
cache is left out: the kernel takes it back where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from strixft.catalog.hosts import Sourced
from strixft.catalog.methods import METHODS
from strixft.data.batches import RowShape
from strixft.model.architecture import architecture_of, sample_layers, text_layers
from strixft.model.load import shape_base
from strixft.model.stream import PIECE_BYTES
from strixft.model.weights import FILE_BYTES
from strixft.plan import trace_cache
from strixft.plan.dry_run import DryRun
from strixft.plan.trace import forward_bytes
from strixft.probe.job import Job
from strixft.step.loss import rows_of_whole_chunks
from strixft.support.units import GIB, MIB

Phase = dict[str, int]

MOST_PROOF_BYTES = 4 * GIB
"""Most memory that the proof of the first loss takes beside the weights, and no less than 1 GiB."""

MOST_EVALUATED = 32
"""Rows of the full length that are evaluated at once where the budget has room for them."""

PROCESS = Sourced(
    value=500 * MIB,
    mark="measured",
    source="resident once torch (CPU build), transformers, PEFT and TRL are imported, 2026-11-25;"
    " ROCm's libraries come on top",
)

MERGED_BYTES = 10
"""A merged weight in flight: as it was read (2), its change (4) and the sum in float32 (4)."""

LOADED_AT_ONCE = 4
"""Tensors that transformers 5.17 to 5.23 loads at once where it does not quantise."""

STORED_BYTES = 2
"""A weight of a checkpoint, in bf16."""

QUANTISED_BYTES = {"native": 0.0, "nf4": 2 * 4 / 64, "int8": 2.0}
"""A weight in flight, beside the one that is quantised and the result: the scales of its block in
float32, twice; a copy in float16 (bitsandbytes 0.50, `quantize_4bit` and `Int8Params`)."""

CONVERTED_BYTES = 6
"""An exported weight in flight: as it was read (2) and in float32 (4)."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """Weights of the largest tensors of a model."""

    largest: int
    """Any tensor: usually the embedding."""
    largest_linear: int
    """A matrix of a layer."""

    @classmethod
    def of(cls, job: Job) -> Tensors:
        """Return those of a job's model; one layer of each kind is looked at."""
        base = shape_base(
            job.config, METHODS["full"], job.dtype, layers=sample_layers(job.architecture.kinds)
        )
        inside = [p.numel() for p in text_layers(base).parameters()]
        return cls(max(p.numel() for p in base.parameters()), max(inside))


def outside_layers_bytes(job: Job) -> int:
    """Return bytes of embedding, last norm and head, which every method keeps in `job.dtype`."""
    base = shape_base(job.config, METHODS["full"], job.dtype, layers=[0])
    inside = sum(p.nbytes for p in text_layers(base).parameters())
    return sum(p.nbytes for p in base.parameters()) - inside


def kv_cache_bytes(config: Any, rows: int, tokens: int, element_bytes: int) -> int:
    """Return bytes of keys and values of a batch of answers; a window's layer keeps no more."""
    cached = architecture_of(config).cached
    numbers = sum(layer.numbers * min(tokens, layer.window or tokens) for layer in cached)
    return numbers * rows * element_bytes


class PhasePeaks:
    """The phases of one run.

    Args:
        job: What runs, and where.
        run: The dry run of the training step.
    """

    def __init__(self, job: Job, run: DryRun) -> None:
        self._job, self._config, self._host, self._run = job, job.config, job.host, run
        self._method, self._dtype = job.method, job.dtype
        self._element = self._dtype.itemsize
        self._tensors = Tensors.of(job)
        self._fixed = run.parts["weights"] + run.parts["adapter"]
        self._forwards: dict[RowShape, int] = {}

    def load(self) -> Phase:
        """Return the peak of loading: tensor by tensor, the embedding first, quantised one by one.

        So the device holds what is loaded and, where it is quantised or cast, the tensor as it was
        read. The host holds pieces of the files, and a file of 4-bit weights that is written.
        """
        linear, largest = self._tensors.largest_linear, self._tensors.largest
        base = self._method.base
        cast = 0 if self._dtype is torch.bfloat16 else STORED_BYTES
        if base == "native":
            device = self._fixed + LOADED_AT_ONCE * cast * largest
            return self._phase(device, LOADED_AT_ONCE * PIECE_BYTES)
        in_flight = int(linear * (self._element + cast + QUANTISED_BYTES[base]))
        first = outside_layers_bytes(self._job) + cast * largest
        written = max(FILE_BYTES, largest * self._element) if base == "nf4" else 0
        moved = linear * self._element if base == "int8" else 0  # through the host, to be quantised
        return self._phase(max(self._fixed + in_flight, first), PIECE_BYTES + written + moved)

    def train(self) -> Phase:
        """Return what the allocator holds; the host has the process, and rows that do not count."""
        return self._phase(self._run.reserved_bytes, 0)

    def proof(self) -> Phase:
        """Return weights, and scores and logits of a document by the model's own forward pass."""
        spare = self._run.reserved_bytes - self._fixed
        return self._phase(self._fixed + min(max(spare, GIB), MOST_PROOF_BYTES), 0)

    def evaluate(self, rows: int = MOST_EVALUATED) -> Phase:
        """Return weights, and a dry forward pass without gradients over rows trained whole."""
        length, vocabulary = self._run.shape.length, self._config.get_text_config().vocab_size
        trained = rows_of_whole_chunks(rows * (length - 1), vocabulary)
        return self._phase(self._fixed + self._forward(RowShape(rows, length, trained)), 0)

    def generate(self, rows: int = MOST_EVALUATED) -> Phase:
        """Return weights, the prompts' dry forward pass, and keys and values up to `max_length`."""
        length = self._run.shape.length
        cache = kv_cache_bytes(self._config, rows, length, self._element)
        prompts = RowShape(rows, length, rows)
        return self._phase(self._fixed + self._forward(prompts) + cache, 0)

    def evaluated_rows(self, budget_bytes: int) -> int:
        """Return the largest power of two of rows whose evaluation fits the budget, at least 1."""
        rows, both = MOST_EVALUATED, (self.evaluate, self.generate)
        while rows > 1 and max(phase(rows)["device_bytes"] for phase in both) > budget_bytes:
            rows //= 2
        return rows

    def merge(self) -> Phase:
        """Return the largest tensor on the host that is merged or copied, one at a time."""
        adapter = self._run.parts["adapter"] if self._method.adapter != "none" else 0
        merged = self._tensors.largest_linear * MERGED_BYTES if adapter else 0
        return self._phase(0, max(merged, self._tensors.largest * self._element) + adapter)

    def export(self) -> Phase:
        """Return the largest tensor on the host, through float32, one at a time."""
        return self._phase(0, self._tensors.largest * CONVERTED_BYTES)

    def _forward(self, shape: RowShape) -> int:
        if shape not in self._forwards:
            layers = sample_layers(self._job.kinds)
            self._forwards[shape] = trace_cache.number(
                trace_cache.name_of(self._job, shape, "forward"),
                lambda: forward_bytes(self._job, shape, layers),
            )
        return int(self._host.workspace_bytes.value) + self._forwards[shape]

    @staticmethod
    def _phase(device_bytes: int, host_bytes: int) -> Phase:
        return {"device_bytes": device_bytes, "host_bytes": int(PROCESS.value) + host_bytes}


def phases(life: PhasePeaks, evaluated_rows: int) -> dict[str, Phase]:
    """Return device and host peak of each phase; see `PhasePeaks` for each one's rule."""
    return {
        "load": life.load(),
        "proof": life.proof(),
        "train": life.train(),
        "evaluate": life.evaluate(evaluated_rows),
        "generate": life.generate(evaluated_rows),
        "merge": life.merge(),
        "export": life.export(),
    }
