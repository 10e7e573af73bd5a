"""Keeps a run inside its budget. On unified memory an over-commit freezes the host."""

from __future__ import annotations

import os

import torch

from strixft.hardware import HOSTS, Budget, Host, Sourced, budget, this_host
from strixft.rates import with_rates
from strixft.recipe import Memory


def device_type() -> str:
    """`cuda` where torch has a GPU (ROCm's too), else `cpu`; `STRIXFT_DEVICE` overrules it."""
    asked = os.environ.get("STRIXFT_DEVICE")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _discrete_gpu() -> Host:
    free, _ = torch.cuda.mem_get_info()
    return Host(
        name=torch.cuda.get_device_name(),
        device="cuda",
        unified=False,
        memory_bytes=Sourced(
            value=free + torch.cuda.memory_reserved(),
            mark="read here",
            source="torch.cuda.mem_get_info",
        ),
        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def find_host(name: str) -> Host:
    """The host a recipe or `--host` names: a row of the table, or this machine.

    Args:
        name: `auto` (this machine), `cpu` (its CPU alone), or a row of `HOSTS`.
    """
    if name not in ("auto", "cpu"):
        return HOSTS[name]
    if name == "cpu" or device_type() == "cpu":
        return with_rates(this_host(device="cpu"))
    host = this_host(device="cuda")
    return with_rates(host if host.device == "cuda" else _discrete_gpu())


def budget_for(memory: Memory, host: Host) -> Budget:
    """What a run may use on a host."""
    return budget(host, memory.reserve_gib)


def cap(num_bytes: int) -> str:
    """Limit what this process may allocate on the device; returns what was done.

    torch ≥ 2.10 divides by `total_memory` of the device's properties (facts: unslothai/unsloth
    commit 7aa021736e); on unified memory that total can be below what is there, so a budget above
    it is not capped.
    """
    if device_type() == "cpu":
        return "none: torch has no limit for CPU memory"
    total = torch.cuda.get_device_properties(0).total_memory
    if num_bytes > total:
        return f"none: torch sees {total} bytes, fewer than the budget"
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    return f"{num_bytes} of {total} bytes"
