"""What an operator costs: FLOP, bytes moved, and the time they take at a host's rates.

Each operator takes the longer of its FLOP at the matrix rate and its bytes at the bandwidth
(roofline, doi:10.1145/1498765.1498785). Launching is hidden behind the device's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from strixft.hardware import Host


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates that time is predicted with."""

    bytes_per_s: float
    flop_per_s: dict[str, float]
    """By dtype."""

    @classmethod
    def of(cls, host: Host) -> Rates | None:
        """A host's rates; None where they are not known."""
        if host.bandwidth_bytes_per_s is None or not host.matmul_flop_per_s:
            return None
        rates = {dtype: rate.value for dtype, rate in host.matmul_flop_per_s.items()}
        return cls(host.bandwidth_bytes_per_s.value, rates)

    def seconds(self, flop: float, num_bytes: float, dtype: torch.dtype) -> float:
        """Time of one operator."""
        name = str(dtype).removeprefix("torch.")
        rate = self.flop_per_s.get(name) or min(self.flop_per_s.values())
        spent: float = max(flop / rate, num_bytes / self.bytes_per_s)
        return spent


def weight_of_4bit(args: Any) -> tuple[int, int]:
    """Rows and columns of the matrix behind a `bitsandbytes::gemm_4bit`."""
    rows, columns = args[2]
    return rows, columns


def is_4bit_product(func: Any) -> bool:
    """Whether an operator multiplies by a 4-bit matrix."""
    return str(func).startswith("bitsandbytes.gemm_4bit")


def count_flop(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Floating-point operations of an operator; those of elementwise ones do not count."""
    if is_4bit_product(func):
        rows, columns = weight_of_4bit(args)
        tokens: int = args[0].numel() // columns
        return 2.0 * tokens * rows * columns
    counter = flop_registry.get(getattr(func, "overloadpacket", None))
    return float(counter(*args, **kwargs, out_val=result)) if counter else 0.0


def _nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_iter(tensors) if isinstance(t, Tensor))


def count_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written; a view moves nothing."""
    if getattr(func, "is_view", False):
        return 0
    moved = _nbytes(result) + _nbytes(args) + _nbytes(list(kwargs.values()))
    if is_4bit_product(func):  # the weight is written out and read again
        rows, columns = weight_of_4bit(args)
        moved += 2 * rows * columns * args[0].element_size()
    return moved


def operator_seconds(rates: Rates, func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Predicted time of one operator."""
    first = next((t for t in tree_iter(result) if isinstance(t, Tensor)), None)
    if first is None:
        return 0.0
    flop = count_flop(func, args, kwargs, result)
    return rates.seconds(flop, count_bytes(func, args, kwargs, result), first.dtype)
