"""One attention backend, forward and backward over packed rows, against float64.

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

from strixft.attention.backends import AttentionBackend, Heads
from strixft.attention.core import FUNCTIONS, use_kernels
from strixft.attention.masks import layer_inputs
from strixft.support.child import Figures

DOCUMENTS = {"cuda": (1021, 517, 301, 130, 79), "cpu": (41, 23, 17, 9, 6)}
"""Tokens of the documents of a row: 2048 and 96, and no boundary where a kernel's block ends."""

ROWS = 2

WINDOW = {"cuda": 200, "cpu": 8}
"""Tokens that a layer with a window looks back here."""

ROUNDINGS = 8
"""Machine epsilons of the dtype that a result may be off, of the reference's largest value:
weights, the gradient of the scores, products and results are rounded to half of one each, one after
the other. Seen on a CPU in bf16: 0.9."""

REPEATS = 5

BUSY_SIDE = 4096
"""Side of a square product that keeps a GPU busy while Python hands it the next work."""

TRIES = 7
"""To keep it busy for long enough: with one such product, then with twice as many each time."""


@dataclass(frozen=True, slots=True)
class Case:
    """Queries, keys, values and a gradient of the result, (all documents' tokens, heads, D)."""

    lengths: tuple[int, ...]
    """Tokens of the documents, all rows laid end to end."""
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    softcap: float | None
    window: int | None
    sinks: Tensor | None = None
    """Learned, (heads of queries,)."""

    @classmethod
    def random(
        cls, heads: Heads, device: str, dtype: torch.dtype, *, windowed: bool = False
    ) -> Case:
        """Draw normal values, the same each time."""
        lengths = (*DOCUMENTS[device], *reversed(DOCUMENTS[device]))
        generator = torch.Generator().manual_seed(0)
        counts = (heads.query_heads, heads.key_heads, heads.key_heads, heads.query_heads)
        wide, of_value = heads.head_size, heads.value_size or heads.head_size
        query, key, value, gradient = (
            torch.randn(sum(lengths), count, size, generator=generator).to(dtype)
            for count, size in zip(counts, (wide, wide, of_value, of_value), strict=True)
        )
        window = WINDOW[device] if windowed else None
        sinks = torch.randn(heads.query_heads, generator=generator).to(dtype)
        return cls(
            lengths, query, key, value, gradient, heads.softcap, window,
            sinks if heads.sinks else None,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.query.shape[-1] ** -0.5)


def _document(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, case: Case) -> Tensor:
    """Softmax written out for one document and one head of keys: (H/G, n, D) and (1, n, D).

    Sinks are (H/G); -∞ for none.
    """
    scores = query @ key.transpose(1, 2) * case.scale  # (H/G, n, n)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    if case.window is not None:
        seen = seen.triu(1 - case.window)
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(seen), 1)], dim=-1)
    weights: Tensor = scores.softmax(-1)[..., :-1]
    return weights @ value


def reference(case: Case) -> list[Tensor]:
    """Return the result and the gradients of queries, keys and values in float64.

    They come from plain products on the CPU, each of the shape of its tensor in the case.
    """
    tensors = (case.query, case.key, case.value, case.gradient)
    query, key, value, gradient = (tensor.double() for tensor in tensors)
    result = [torch.empty_like(tensor) for tensor in (gradient, query, key, value)]
    groups, start = query.shape[1] // key.shape[1], 0
    none = torch.full(query.shape[1:2], float("-inf"), dtype=torch.float64)
    sinks = none if case.sinks is None else case.sinks.double()
    for length in case.lengths:
        place = slice(start, start + length)
        for head in range(key.shape[1]):
            many, one = slice(head * groups, (head + 1) * groups), slice(head, head + 1)
            q, k, v = (
                tensor[place, heads].transpose(0, 1).requires_grad_()
                for tensor, heads in ((query, many), (key, one), (value, one))
            )
            output = _document(q, k, v, sinks[many], case)
            found = torch.autograd.grad(output, (q, k, v), gradient[place, many].transpose(0, 1))
            for whole, part, heads in zip(
                result, (output.detach(), *found), (many, many, one, one), strict=True
            ):
                whole[place, heads] = part.transpose(0, 1)
        start += length
    return result


class _Layer(nn.Module):
    """Attributes that transformers reads from an attention layer."""

    is_causal, layer_idx = True, 0

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


class BackendCall:
    """The call of an attention backend that a model makes, on a case and a device."""

    def __init__(self, backend: AttentionBackend, case: Case, device: str) -> None:
        self._device, lengths = device, case.lengths
        if backend.packed:
            rows, length = ROWS, sum(lengths) // ROWS
            starts = torch.tensor((0, *lengths[:-1])).cumsum(0).tolist()
        else:  # a document a row, padded
            rows, length = len(lengths), max(lengths)
            starts = list(range(0, rows * length, length))
        pieces = zip(starts, lengths, strict=True)
        places = torch.cat([torch.arange(start, start + size) for start, size in pieces])
        self._shape, self._places = (rows, length), places.to(device)  # (all documents' tokens,)
        self._attend = FUNCTIONS[backend.implementation]
        self._layer = _Layer(case.query.shape[1] // case.key.shape[1])
        self._options = self._inputs(backend, case)
        self._tensors = [self._laid_out(t) for t in (case.query, case.key, case.value)]
        self._gradient = self._laid_out(case.gradient).transpose(1, 2).contiguous()  # (B, T, H, D)

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """Lay documents out in rows, (B, heads, T, D)."""
        rows, length = self._shape
        heads = tensor.shape[1:]
        flat = torch.zeros(rows * length, *heads, dtype=tensor.dtype, device=self._device)
        flat[self._places] = tensor.to(self._device)
        return flat.view(rows, length, *heads).transpose(1, 2).contiguous().requires_grad_()

    def _inputs(self, backend: AttentionBackend, case: Case) -> dict[str, Any]:
        """Return what the decoder passes on to its layers."""
        options: dict[str, Any] = {"scaling": case.scale}
        if case.softcap is not None:
            options["softcap"] = case.softcap
        if case.sinks is not None:
            options["s_aux"] = case.sinks.to(self._device)
        if not backend.packed:
            return options | {"attention_mask": None}
        ends = torch.tensor((0, *case.lengths), device=self._device).cumsum(0)
        batch = {
            "input_ids": torch.zeros(self._shape, dtype=torch.int64, device=self._device),
            "cu_seq_lens": ends.to(torch.int32),
            "longest": max(case.lengths),
        }
        return options | layer_inputs(backend, batch, case.window)

    def forward(self) -> Tensor:
        """Return the result, (B, T, H, D)."""
        output: Tensor = self._attend(self._layer, *self._tensors, **self._options)[0]
        return output

    def both(self) -> tuple[Tensor, ...]:
        """Return the result and the gradients of queries, keys and values, all (B, T, heads, D)."""
        output = self.forward()
        found = torch.autograd.grad(output, self._tensors, self._gradient)
        return output, *(gradient.transpose(1, 2) for gradient in found)

    def results(self) -> list[Tensor]:
        """Return the tensors of `both` without padding, as `reference` does."""
        return [tensor.flatten(0, 1)[self._places] for tensor in self.both()]

    def peak_bytes(self) -> int:
        """Return the most bytes alive in forward and backward, beyond those before."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.both()
            return torch.cuda.max_memory_allocated() - before
        # takes seconds, and only the bench asks
        from strixft.step.memory_tracker import MemoryTracker

        tracker = MemoryTracker()
        for tensor in (*self._tensors, self._gradient):
            tracker.watch(tensor, "workspace")
        before = tracker.live_bytes
        with tracker:
            self.both()
        return tracker.peak_bytes - before


@cache
def _case(
    heads: Heads, device: str, dtype: torch.dtype, *, windowed: bool
) -> tuple[Case, list[Tensor]]:
    """Return a case and its reference, the same for all backends of a child."""
    case = Case.random(heads, device, dtype, windowed=windowed)
    return case, reference(case)


def measure_backend(
    backend: Mapping[str, Any],
    heads: Mapping[str, Any],
    device: str,
    dtype: str,
    *,
    peak: bool = False,
) -> Figures:
    """Measure error, time and memory of an attention backend.

    Args:
        backend: A row of `BACKENDS`, as plain data.
        heads: `Heads` of the model, as plain data.
        device: `cuda` or `cpu`.
        dtype: Such as `bfloat16`.
        peak: Count the peak on a CPU too.

    Returns:
        `error` of the largest value of the reference, `forward_ms`, `backward_ms`,
        `peak_bytes`; and a `problem` if it is wrong.
    """
    row, model, kind = AttentionBackend(**backend), Heads(**heads), getattr(torch, dtype)
    importlib.import_module(row.module)
    use_kernels(row.kernels)
    # a generated kernel with a window is the one without and a comparison: one is compiled
    windows = (True,) if row.mask == "blocks" else (False, True)
    errors = []
    for windowed in windows if model.windowed and row.packed else (False,):
        case, due = _case(model, device, kind, windowed=windowed)
        call = BackendCall(row, case, device)
        errors.append(largest_error(call.results(), due))
    forward_ms, both_ms = milliseconds(call.forward, device), milliseconds(call.both, device)
    return {
        **judged(max(errors), allowed_error(kind, max(model.head_size, *case.lengths))),
        "forward_ms": forward_ms,
        "backward_ms": round(max(0.0, both_ms - forward_ms), 4),
        "peak_bytes": call.peak_bytes() if peak or device == "cuda" else None,
    }


def allowed_error(dtype: torch.dtype, terms: int) -> float:
    """Return the largest error allowed, of the largest value of the reference.

    Args:
        dtype: Of inputs and results.
        terms: Of the longest sum of products, which is added up in float32.
    """
    return ROUNDINGS * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps


def largest_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest difference, of its tensor's largest value in the reference.

    A value that is not a number makes it infinite.
    """
    errors = [
        float((ours.detach().double().cpu() - right).abs().max() / right.abs().max())
        for ours, right in zip(found, reference, strict=True)
    ]
    return max(error if error < float("inf") else float("inf") for error in errors)


def judged(error: float, allowed: float) -> Figures:
    """Return an error as figures, with a `problem` if it is more than is allowed."""
    figures: Figures = {"error": error, "allowed_error": allowed}
    if error == float("inf"):
        return {**figures, "error": None, "problem": "gives values that are not finite numbers"}
    if error > allowed:
        figures["problem"] = f"wrong by {error:.2g} of the largest value, {allowed:.2g} is allowed"
    return figures


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Return the least time of a few calls: whatever else the machine does only adds to it.

    On a GPU its own time, as in a training step, where Python is ahead of it: some backends take
    longer to be handed over than to run.
    """
    timed = _seconds_on_gpu if device == "cuda" else _seconds_here
    return round(min(timed(work) for _ in range(REPEATS)) * 1e3, 4)


def _seconds_here(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _seconds_on_gpu(work: Callable[[], Any]) -> float:
    """Return the seconds between two events; the GPU is kept busy until both are on their way."""
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
