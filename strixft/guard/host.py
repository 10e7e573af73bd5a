"""Which device and host a run is for, and what it may use there."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from strixft.catalog.hosts import (
    CUDA_WORKSPACE,
    HIP_WORKSPACE,
    HOSTS,
    Budget,
    Host,
    Sourced,
    budget,
    known_host,
    this_host,
)
from strixft.catalog.rates import with_rates
from strixft.recipe.schema import Memory
from strixft.support.environment import OVERRIDE, OVERRIDE_WHY
from strixft.support.errors import HostError


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
        workspace_bytes=CUDA_WORKSPACE if torch.version.hip is None else HIP_WORKSPACE,
    )


def _refuse_override() -> None:
    """An error where ROCm is told to take the GPU for another one."""
    value = os.environ.get(OVERRIDE)
    if value is not None and torch.version.hip is not None:
        raise HostError(
            f"{OVERRIDE}={value} is set, and {OVERRIDE_WHY}",
            fix=f"unset {OVERRIDE}   here and where it is set:"
            f" grep -rn {OVERRIDE} ~/.profile ~/.bashrc /etc/environment /etc/profile.d;"
            " then start Python again",
        )


def _architecture() -> str:
    """In ROCm's terms, such as `gfx1151`; empty on other GPUs."""
    name = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")
    return str(name).partition(":")[0]


def _this_gpu() -> Host:
    _refuse_override()
    amd = this_host(device="cuda") if torch.version.hip is not None else None
    found = amd if amd is not None and amd.device == "cuda" else _discrete_gpu()
    return replace(found, architecture=_architecture())


def find_host(name: str) -> Host:
    """The host a recipe or `--host` names: a row of the table, or this machine.

    Args:
        name: `auto` (this machine), `cpu` (its CPU alone), or a row of `HOSTS`.

    Raises:
        HostError: ROCm is told to take this GPU for another one.
    """
    if known_host(name) in HOSTS:
        return HOSTS[name]
    on_cpu = name == "cpu" or device_type() == "cpu"
    found = this_host(device="cpu") if on_cpu else _this_gpu()
    return replace(with_rates(found), here=True)


def training_host() -> Host:
    """The device of this machine that training uses."""
    return find_host("auto" if device_type() == "cuda" else "cpu")


def budget_for(memory: Memory, host: Host) -> Budget:
    """What a run may use on a host."""
    return budget(host, memory.reserve_gib)
