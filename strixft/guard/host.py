"""Which device and host a run is for, and what it may use there."""

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
