"""The limit that torch's allocator keeps: an error of ours before the host runs out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from strixft.guard.host import device_type
from strixft.support.units import format_gib


@dataclass(frozen=True, slots=True)
class Cap:
    """What was limited."""

    fraction: float | None
    """Of the total that torch sees; None where there is no limit."""
    says: str
    warning: str | None = None


def cap_of(budget_bytes: int, needed_bytes: int, total_bytes: int) -> Cap:
    """The limit for a budget.

    Args:
        budget_bytes: What the run may use.
        needed_bytes: What its plan reserves.
        total_bytes: What torch multiplies the fraction by; on unified memory it can be half of
            what is there (ROCm/ROCm#6004), and a fraction above 1 is refused.
    """
    if budget_bytes <= total_bytes:
        says = f"{budget_bytes} of {total_bytes} bytes"
        return Cap(budget_bytes / total_bytes, says)
    if needed_bytes <= total_bytes:
        return Cap(1.0, f"{total_bytes} bytes, all that torch sees")
    warning = (
        f"torch sees {format_gib(total_bytes)} and the plan needs {format_gib(needed_bytes)}:"
        " its allocator has no limit, only the watch over the host's memory"
    )
    return Cap(None, f"none: torch sees {total_bytes} bytes, fewer than the plan", warning)


def cap(budget_bytes: int, needed_bytes: int) -> Cap:
    """Limit what this process may allocate on the device, before anything is loaded.

    torch ≥ 2.10 multiplies the fraction by `total_memory` of the device's properties
    (unslothai/unsloth commit 7aa021736e).

    Args:
        budget_bytes: What the run may use.
        needed_bytes: What its plan reserves.
    """
    if device_type() == "cpu":
        return Cap(None, "none: torch has no limit for CPU memory")
    found = cap_of(budget_bytes, needed_bytes, torch.cuda.get_device_properties(0).total_memory)
    if found.fraction is not None:
        torch.cuda.set_per_process_memory_fraction(found.fraction)
    return found
