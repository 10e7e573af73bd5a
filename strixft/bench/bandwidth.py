"""Memory bandwidth: copying, reading, writing, and a matrix times a vector as decoding does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strixft.bench.result import Row
from strixft.bench.timing import figures, time_work
from strixft.catalog.hosts import budget
from strixft.guard.host import device_type, find_host
from strixft.support.errors import FitError
from strixft.support.units import GIB, format_gib

SIZE_GIB = {"cuda": 1.0, "cpu": 0.25}

COLUMNS = 8192
"""C of the matrix that is multiplied by a vector."""


Work = tuple[Callable[[], Any], float]
"""What to do, and the bytes that it moves."""


def _works(num_bytes: int, device: str) -> dict[str, Work]:
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


def bench_bandwidth(size_gib: float = 0.0, repeat: int = 5, check: bool = False) -> list[Row]:
    """Time what moves bytes and computes next to nothing.

    Args:
        size_gib: Of each of two buffers, far above every cache; 0 is 1, on a CPU 0.25.
        repeat: Turns of each.
        check: Time each by torch alone too, in turns.

    Raises:
        FitError: The buffers do not fit.
    """
    device, host = device_type(), find_host("auto")
    num_bytes = round((size_gib or SIZE_GIB[device]) * GIB)
    if 2.5 * num_bytes > budget(host, 0).num_bytes:
        raise FitError(
            f"two buffers of {format_gib(num_bytes)} do not fit {host.name}",
            fix="--size-gib with a smaller number",
        )
    bus, rows = host.bus_bytes_per_s, []
    for name, (work, moved) in _works(num_bytes, device).items():
        found = figures(time_work(work, device, repeat, check=check), moved / 1e9, "gb_per_s")
        share = found["gb_per_s"] * 1e9 / bus.value if bus else None
        rows.append({"work": name, "size_gib": num_bytes / GIB, **found, "share_of_bus": share})
    return rows


def rate(rows: list[Row]) -> float:
    """Bytes per second of the copy: for planning."""
    return next(float(row["gb_per_s"]) * 1e9 for row in rows if row["work"] == "copy")
