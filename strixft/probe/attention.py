"""One way of attention, forward and backward over packed rows, against float64.

Shapes: B rows, T tokens, N documents, n tokens of one, H heads, G heads of keys, D head size.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from strixft.attention.backends import AttentionBackend, Heads
from strixft.attention.core import use_kernels
from strixft.attention.masks import layer_inputs
from strixft.support.child import Figures

DOCUMENTS = {"cuda": (1021, 517, 301, 130, 79), "cpu": (41, 23, 17, 9, 6)}
"""Tokens of the documents of a row: 2048 and 96, and no boundary where a kernel's block ends."""

ROWS = 2

WINDOW = {"cuda": 200, "cpu": 8}
"""Tokens that a layer with a window looks back here."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is computed: (documents' tokens, heads, D) of queries, keys, values and a gradient."""

    lengths: tuple[int, ...]
    """Of the documents, all rows laid end to end."""
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    """Of the result."""
    softcap: float | None
    window: int | None

    @classmethod
    def random(
        cls, heads: Heads, device: str, dtype: torch.dtype, *, windowed: bool = False
    ) -> Subject:
        """Normal values, the same each time."""
        row = DOCUMENTS[device]
        lengths = (*row, *reversed(row))
        generator = torch.Generator().manual_seed(0)
        counts = (heads.query_heads, heads.key_heads, heads.key_heads, heads.query_heads)
        wide, of_value = heads.head_size, heads.value_size or heads.head_size
        query, key, value, gradient = (
            torch.randn(sum(lengths), count, size, generator=generator).to(dtype)
            for count, size in zip(counts, (wide, wide, of_value, of_value), strict=True)
        )
        window = WINDOW[device] if windowed else None
        return cls(lengths, query, key, value, gradient, heads.softcap, window)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.query.shape[-1] ** -0.5)


def _document(query: Tensor, key: Tensor, value: Tensor, subject: Subject) -> Tensor:
    """Softmax written out for one document and one head of keys: (H/G, n, D) and (1, n, D)."""
    scores = query @ key.transpose(1, 2) * subject.scale  # (H/G, n, n)
    if subject.softcap is not None:
        scores = subject.softcap * torch.tanh(scores / subject.softcap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    if subject.window is not None:
        seen = seen.triu(1 - subject.window)
    weights: Tensor = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights @ value


def reference(subject: Subject) -> list[Tensor]:
    """Result and gradients of queries, keys and values in float64, by plain products on the CPU."""
    names = ("query", "key", "value", "gradient")
    query, key, value, gradient = (getattr(subject, name).double() for name in names)
    result = [torch.empty_like(tensor) for tensor in (gradient, query, key, value)]
    groups, start = query.shape[1] // key.shape[1], 0
    for length in subject.lengths:
        place = slice(start, start + length)
        for head in range(key.shape[1]):
            many, one = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
            leaves = [
                tensor[place, heads].transpose(0, 1).requires_grad_()
                for tensor, heads in ((query, many), (key, one), (value, one))
            ]
            output = _document(leaves[0], leaves[1], leaves[2], subject)
            found = torch.autograd.grad(output, leaves, gradient[place, many].transpose(0, 1))
            for whole, part, heads in zip(
                result, (output.detach(), *found), (many, many, one, one), strict=True
            ):
                whole[place, heads] = part.transpose(0, 1)
        start += length
    return result


class _Layer(nn.Module):
    """What transformers asks of an attention layer."""

    is_causal, layer_idx = True, 0

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


class Way:
    """A rung at work on a subject: the call that a model makes.

    Args:
        backend: How attention is computed.
        subject: On what.
        device: `cuda` or `cpu`.
    """

    def __init__(self, backend: AttentionBackend, subject: Subject, device: str) -> None:
        self.backend, self.subject, self.device = backend, subject, device
        rows = len(subject.lengths) if not backend.packed else ROWS
        length = sum(subject.lengths) // ROWS if backend.packed else max(subject.lengths)
        self._shape = rows, length
        self._places = self._find_places()  # (tokens of all documents,)
        groups = subject.query.shape[1] // subject.key.shape[1]
        self._layer = _Layer(groups)
        self._options = self._inputs()
        tensors = (subject.query, subject.key, subject.value, subject.gradient)
        self.query, self.key, self.value, gradient = map(self._laid_out, tensors)
        self.gradient = gradient.transpose(1, 2).contiguous()  # (B, T, H, D)

    def _find_places(self) -> Tensor:
        """Where the documents' tokens stand in the rows laid end to end: padded if not packed."""
        if self.backend.packed:
            return torch.arange(sum(self.subject.lengths), device=self.device)
        starts = range(0, len(self.subject.lengths) * self._shape[1], self._shape[1])
        pairs = zip(starts, self.subject.lengths, strict=True)
        pieces = [torch.arange(start, start + length) for start, length in pairs]
        return torch.cat(pieces).to(self.device)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        rows, length = self._shape
        flat = torch.zeros(rows * length, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        flat[self._places] = tensor.to(self.device)
        laid = flat.view(rows, length, *tensor.shape[1:]).transpose(1, 2)  # (B, H, T, D)
        return laid.contiguous().requires_grad_()

    def _inputs(self) -> dict[str, Any]:
        """What the layer is told, as the decoder passes it on."""
        subject, options = self.subject, dict[str, Any](scaling=self.subject.scale)
        if subject.softcap is not None:
            options["softcap"] = subject.softcap
        if not self.backend.packed:
            return options | {"attention_mask": None}
        ends = torch.tensor((0, *subject.lengths), device=self.device).cumsum(0)
        batch = {
            "input_ids": torch.zeros(self._shape, dtype=torch.int64, device=self.device),
            "cu_seq_lens": ends.to(torch.int32),
            "longest": max(subject.lengths),
        }
        return options | layer_inputs(self.backend, batch, subject.window)

    def forward(self) -> Tensor:
        """The result, (B, T, H, D)."""
        attend = ALL_ATTENTION_FUNCTIONS[self.backend.implementation]
        output: Tensor = attend(self._layer, self.query, self.key, self.value, **self._options)[0]
        return output

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values."""
        return torch.autograd.grad(output, (self.query, self.key, self.value), self.gradient)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return self.backward(self.forward())

    def _of_documents(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[self._places]  # (tokens, H, D)

    def results(self) -> list[Tensor]:
        """As `reference` gives them."""
        output = self.forward()
        gradients = [tensor.transpose(1, 2) for tensor in self.backward(output)]
        return [self._of_documents(tensor) for tensor in (output, *gradients)]


def _peak_bytes(way: Way) -> int:
    """Most bytes alive in one forward and backward, beyond what is alive before it."""
    if way.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.both()
        return torch.cuda.max_memory_allocated() - before
    from strixft.step.tracker import (
        MemoryTracker,  # seconds to import, and only asked for by the bench
    )

    tracker = MemoryTracker()
    for tensor in (way.query, way.key, way.value, way.gradient):
        tracker.watch(tensor, "workspace")
    before = tracker.live_bytes
    with tracker:
        way.both()
    return tracker.peak_bytes - before


@cache
def _case(
    heads: Heads, device: str, dtype: torch.dtype, *, windowed: bool
) -> tuple[Subject, list[Tensor]]:
    """A subject and its reference, the same for all rungs of a child."""
    subject = Subject.random(heads, device, dtype, windowed=windowed)
    return subject, reference(subject)


def measure_rung(
    backend: Mapping[str, Any],
    heads: Mapping[str, Any],
    device: str,
    dtype: str,
    *,
    peak: bool = False,
) -> Figures:
    """Error, time and memory of a way to compute attention.

    Args:
        backend: A row of `BACKENDS`, as plain data.
        heads: What a model needs, as plain data.
        device: `cuda` or `cpu`.
        dtype: Such as `bfloat16`.
        peak: Count the peak on a CPU too.

    Returns:
        `error` of the largest value of the reference, `forward_ms`, `backward_ms`,
        `peak_bytes`; and a `problem` if it is wrong.
    """
    way_of, model, kind = AttentionBackend(**backend), Heads(**heads), getattr(torch, dtype)
    importlib.import_module(way_of.module)
    use_kernels(way_of.kernels)
    subject, due = _case(model, device, kind, windowed=False)
    way = Way(way_of, subject, device)
    error = largest_error(way.results(), due)
    if model.windowed and way_of.packed:
        narrow, due = _case(model, device, kind, windowed=True)
        error = max(error, largest_error(Way(way_of, narrow, device).results(), due))
    forward_ms, both_ms = milliseconds(way.forward, device), milliseconds(way.both, device)
    return {
        **judged(error, allowed_error(kind, max(model.head_size, *subject.lengths))),
        "forward_ms": forward_ms,
        "backward_ms": round(max(0.0, both_ms - forward_ms), 4),
        "peak_bytes": _peak_bytes(way) if peak or device == "cuda" else None,
    }


ROUNDINGS = 8
"""Machine epsilons of the dtype that a result may be off, of the reference's largest value:
weights, the gradient of the scores, products and results are rounded to half of one each, one after
the other. Seen on a CPU in bf16: 0.9."""

REPEATS = 5

BUSY_SIDE = 4096
"""Of a square product that keeps a GPU busy while Python hands it the next work."""

TRIES = 7
"""To keep it busy for long enough: with one such product, then with twice as many each time."""


def allowed_error(dtype: torch.dtype, terms: int) -> float:
    """Largest error allowed, of the largest value of the reference.

    Args:
        dtype: Of inputs and results.
        terms: Of the longest sum of products, which is added up in float32.
    """
    return ROUNDINGS * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


def largest_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference, of its tensor's largest value in the reference; NaN is infinite."""
    errors = [
        float((ours.detach().double().cpu() - right).abs().max() / right.abs().max())
        for ours, right in zip(found, reference, strict=True)
    ]
    return max(error if error < float("inf") else float("inf") for error in errors)


def judged(error: float, allowed: float) -> dict[str, Any]:
    """The error as figures, with a `problem` if it is more than is allowed."""
    figures: dict[str, Any] = {"error": error, "allowed_error": allowed}
    if error == float("inf"):
        return {**figures, "error": None, "problem": "gives values that are no finite numbers"}
    if error > allowed:
        figures["problem"] = f"wrong by {error:.2g} of the largest value, {allowed:.2g} is allowed"
    return figures


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Least time of a few calls: whatever else the machine does only adds to it.

    On a GPU its own time, as in a training step, where Python is ahead of it: some ways take longer
    to be handed over than to run.
    """
    timed = _seconds_on_gpu if device == "cuda" else _seconds_here
    return round(min(timed(work) for _ in range(REPEATS)) * 1e3, 4)


def _seconds_here(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _seconds_on_gpu(work: Callable[[], Any]) -> float:
    """Seconds between two events; it is kept busy until both are on their way."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    square = torch.zeros(BUSY_SIDE, BUSY_SIDE, dtype=torch.bfloat16, device="cuda")
    for power in range(TRIES):
        for _ in range(2**power):
            torch.mm(square, square)
        begin.record()
        work()
        end.record()
        was_behind = not begin.query()
        end.synchronize()
        if was_behind:
            break
    return float(begin.elapsed_time(end)) / 1e3  # if work waits for the GPU, with the time for that
