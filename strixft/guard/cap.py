"""The limit of torch's allocator: an error in time, before the host runs out of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from strixft.guard.host import device_type
from strixft.support.units import format_gib


@dataclass(frozen=True, slots=True)
class Cap:
    """A limit, and the words for it."""

    fraction: float | None
    """Fraction of the total that torch sees; None without a limit."""
    says: str
    warning: str | None = None


def cap_of(budget_bytes: int, needed_bytes: int, total_bytes: int) -> Cap:
    """Return the limit for a budget.

    Args:
        budget_bytes: Memory that the run may use.
        needed_bytes: Memory that its plan reserves.
        total_bytes: Total that torch multiplies by the fraction; on unified memory it can be half
            of the real one (ROCm/ROCm#6004), and torch refuses a fraction above 1.
    """
    if budget_bytes <= total_bytes:
        return Cap(budget_bytes / total_bytes, f"{budget_bytes} of {total_bytes} bytes")
    if needed_bytes <= total_bytes:
        return Cap(1.0, f"{total_bytes} bytes, all that torch sees")
    warning = (
        f"torch sees {format_gib(total_bytes)} and the plan needs {format_gib(needed_bytes)}:"
        " its allocator has no limit, and only the watch over the host's memory protects the host"
    )
    return Cap(None, f"none: torch sees {total_bytes} bytes, fewer than the plan", warning)


def cap(budget_bytes: int, needed_bytes: int) -> Cap:
    """Limit the device memory of this process, before anything is loaded.

    torch ≥ 2.10 multiplies the fraction by `total_memory` of the device's properties
    (unslothai/unsloth commit 7aa021736e).

    Args:
        budget_bytes: Memory that the run may use.
        needed_bytes: Memory that its plan reserves.
    """
    if device_type() == "cpu":
        return Cap(None, "none: torch has no limit for CPU memory")
    found = cap_of(budget_bytes, needed_bytes, torch.cuda.get_device_properties(0).total_memory)
    if found.fraction is not None:
        torch.cuda.set_per_process_memory_fraction(found.fraction)
    return found
