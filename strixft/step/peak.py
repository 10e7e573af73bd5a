"""Peak memory of a block of code, counted as the device counts it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from strixft.guard import device_type
from strixft.step.tracker import MemoryTracker


@contextlib.contextmanager
def peak_memory(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Peak memory in bytes: torch's own count on a GPU, our tracker's, by part, on a CPU.

    Args:
        model: What is trained in the block.
    """
    found: dict[str, Any] = dict.fromkeys(("peak_bytes", "reserved_bytes", "peak_parts"))
    if device_type() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        tracker = MemoryTracker()
        tracker.watch_model(model)
        with tracker:
            yield found
        found["peak_bytes"], found["peak_parts"] = tracker.peak_bytes, tracker.peak
    found["resident_bytes"] = psutil.Process().memory_info().rss


def release_memory() -> None:
    """Give back what nothing refers to any more, so that whatever comes next finds it free."""
    gc.collect()
    if device_type() == "cuda":
        torch.cuda.empty_cache()
