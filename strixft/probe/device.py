"""What a result of the probe depends on, so that it is not taken for another device or version."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from strixft.attention import core
from strixft.rates import cpu_name
from strixft.runs import versions

PACKAGES = ("torch", "transformers", "bitsandbytes", "flash-attn-4")
VARIABLES = (
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "ROCBLAS_USE_HIPBLASLT",
    "HSA_ENABLE_SDMA",
)
"""Environment variables that choose kernels."""
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


@cache
def _source_digest() -> str:
    """The probe's own version: of the code that is probed, and of the code that probes."""
    folders = (Path(__file__).parent, Path(core.__file__).parent)
    files = (path for folder in folders for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _driver() -> str:
    """Version of the GPU's driver; the kernel's where the driver is part of it."""
    for name in DRIVERS:
        with contextlib.suppress(OSError):
            return Path(name).read_text(encoding="utf-8").splitlines()[0]
    return platform.release()


@cache
def _versions() -> dict[str, str | None]:
    found = versions()
    return {name: found.get(name) for name in PACKAGES}


@cache
def _facts(device: str) -> dict[str, Any]:
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": cpu_name(), "capability": capability}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}"),
        "driver": _driver(),
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
    }


def identity(device: str) -> dict[str, Any]:
    """Device, driver, versions, and the variables that choose kernels.

    Args:
        device: `cuda` or `cpu`.
    """
    return {
        **_facts(device),
        **_versions(),
        **{name: os.environ.get(name) for name in VARIABLES},
        "probe": _source_digest(),
    }
