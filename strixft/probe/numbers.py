"""How far a result may be from its reference, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
