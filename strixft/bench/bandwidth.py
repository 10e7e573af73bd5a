"""Memory bandwidth: copy, read, write, and a matrix times a vector as in decoding.

Shapes: N rows, C columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from strixft.bench.result import BenchRow, Options
from strixft.bench.timing import rate_columns, time_work
from strixft.catalog.hosts import budget
from strixft.guard.host import find_host
from strixft.support.errors import FitError
from strixft.support.units import GIB, format_gib

DEFAULT_GIB = {"cuda": 1.0, "cpu": 0.25}

COLUMNS = 8192
"""C."""


class BandwidthOptions(Options):
    """Time operations that move bytes and compute next to nothing."""

    size_gib: float = Field(
        0.0,
        ge=0,
        description="Size of each of two buffers, far above every cache; 0 means 1, on a CPU 0.25.",
    )
    repeat: int = Field(5, ge=1, description="Turns of each operation.")
    check: bool = Field(False, description="Also time each operation by torch alone, in turns.")


def _operations(num_bytes: int, device: str) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return each operation and the bytes that it moves."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.float16
    count = num_bytes // dtype.itemsize // COLUMNS * COLUMNS
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, COLUMNS), source[:COLUMNS]  # (N, C), (C)
    product = torch.empty(len(matrix), dtype=dtype, device=device)  # (N)
    moved = float(count * dtype.itemsize)
    return {
        "copy": (lambda: target.copy_(source), 2 * moved),
        "read": (lambda: torch.sum(source), moved),
        "write": (lambda: target.fill_(1), moved),
        "matrix × vector": (lambda: torch.mv(matrix, vector, out=product), moved),
    }


def bench_bandwidth(options: BandwidthOptions) -> list[BenchRow]:
    """Time operations that move bytes.

    Raises:
        FitError: The buffers do not fit.
    """
    host = find_host("auto")
    num_bytes = round((options.size_gib or DEFAULT_GIB[host.device]) * GIB)
    if 2.5 * num_bytes > budget(host, 0).num_bytes:
        raise FitError(
            f"two buffers of {format_gib(num_bytes)} do not fit into the memory of {host.name}",
            fix="--size-gib with a smaller number",
        )
    bus, rows = host.bus_bytes_per_s, []
    for name, (operation, moved) in _operations(num_bytes, host.device).items():
        times = time_work(operation, host.device, options.repeat, check=options.check)
        rate = rate_columns(times, moved / 1e9, "gb_per_s")
        share = rate["gb_per_s"] * 1e9 / bus.value if bus else None
        rows.append({"work": name, "size_gib": num_bytes / GIB, **rate, "share_of_bus": share})
    return rows


def copy_rate(rows: list[BenchRow]) -> float:
    """Return the bytes per second of the copy, for planning."""
    return next(float(row["gb_per_s"]) * 1e9 for row in rows if row["work"] == "copy")
