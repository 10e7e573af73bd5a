"""The device and host of a run, the memory that it may use there, and the allocator's limit."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from strixft.catalog.device_rates import with_rates
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
from strixft.model.load import native_dtype
from strixft.recipe.schema import Memory
from strixft.support.environment import OVERRIDE, OVERRIDE_WHY
from strixft.support.errors import HostError
from strixft.support.units import format_gib


def device_type() -> str:
    """Return `cuda` if torch has a GPU (ROCm's too), else `cpu`; `STRIXFT_DEVICE` overrides it."""
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


def _this_gpu() -> Host:
    if torch.version.hip is None:
        return _discrete_gpu()
    override = os.environ.get(OVERRIDE)
    if override is not None:  # ROCm would take the GPU for another one
        raise HostError(
            f"{OVERRIDE}={override} is set, and {OVERRIDE_WHY}",
            fix=f"unset {OVERRIDE}   here and where it is set:"
            f" grep -rn {OVERRIDE} ~/.profile ~/.bashrc /etc/environment /etc/profile.d;"
            " then start Python again",
        )
    amd = this_host(device="cuda")
    return amd if amd.device == "cuda" else _discrete_gpu()


def find_host(name: str) -> Host:
    """Return the host with a name: a row of the table, or this machine.

    Args:
        name: `auto` (this machine), `cpu` (its CPU alone), or a row of `HOSTS`.

    Raises:
        HostError: An environment variable makes ROCm take this GPU for another one.
    """
    if known_host(name) in HOSTS:
        return HOSTS[name]
    if name == "cpu" or device_type() == "cpu":
        return replace(with_rates(this_host(device="cpu")), here=True)
    found = _this_gpu()
    architecture = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")  # ROCm's alone
    found = replace(found, architecture=str(architecture).partition(":")[0])
    return replace(with_rates(found), here=True)


def training_host() -> Host:
    """Return this machine with the device that training uses."""
    return find_host("auto" if device_type() == "cuda" else "cpu")


def training_dtype() -> torch.dtype:
    """Return the type this machine trains and answers in, whatever host the plan was for."""
    host = training_host()
    return native_dtype(host.device, bfloat16=host.bfloat16)


def budget_for(memory: Memory, host: Host) -> Budget:
    """Return the memory that a run may use on a host."""
    return budget(host, memory.reserve_gib)


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
