"""The device as people know it, and the rates measured on it for planning."""

from __future__ import annotations

from pathlib import Path

from strixft.bench import bandwidth, gemm
from strixft.bench.result import Measured
from strixft.catalog.hosts import Sourced
from strixft.catalog.rates import cpu_name, device_name, write_rates
from strixft.guard.host import device_type, find_host


def device_label() -> str:
    """Name and architecture of the GPU, or the processor and its threads in use."""
    import torch

    if device_type() == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name} {getattr(properties, 'gcnArchName', '')}".strip()


def _measured(value: float, result: Measured) -> Sourced:
    source = f"strixft bench {result.bench}, {result.started[:10]}"
    return Sourced(
        value=value, mark="measured", source=f"{source}, torch {result.versions['torch']}"
    )


def write_host_row(result: Measured) -> Path:
    """Keep the measured rates, so that `--host auto` plans with them.

    Args:
        result: Of `gemm` or `bandwidth`.
    """
    name = device_name(find_host("auto"))
    if result.bench == "bandwidth":
        return write_rates(name, bandwidth=_measured(bandwidth.rate(result.rows), result))
    found = gemm.rates(result.rows)
    return write_rates(name, matmul={d: _measured(v, result) for d, v in found.items()})
