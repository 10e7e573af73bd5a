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


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Least time of a few calls: whatever else the machine does only adds to it."""
    times = []
    for _ in range(REPEATS):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return round(min(times) * 1e3, 4)
