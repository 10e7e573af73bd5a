"""Cost of an operator: FLOP, bytes moved, and the time they take at a host's rates.

Each operator takes the longer of its FLOP at the matrix rate and its bytes at the bandwidth
(roofline, doi:10.1145/1498765.1498785), and a moment in which the device goes on to the next. The
processor launches one operator after the other while the device works, so a layer takes the longer
of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from strixft.catalog.hosts import Host
from strixft.step.graphs import writes_4bit_out
from strixft.support.private_torch import schema_of, tree_iter

Floats = npt.NDArray[np.float64]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates that time is predicted with."""

    bytes_per_s: float
    flop_per_s: dict[str, float]
    """By dtype."""
    launch_s: float
    python_s: float
    gap_s: float
    shares: dict[str, float]
    """Shares of the bandwidth where a 4-bit matrix is written out, by the `Cost`'s dtype."""

    @classmethod
    def of(cls, host: Host) -> Rates | None:
        """Return a host's rates; None where they are not known."""
        if host.bandwidth_bytes_per_s is None or not host.matmul_flop_per_s:
            return None
        rates = {dtype: rate.value for dtype, rate in host.matmul_flop_per_s.items()}
        shares = {
            UNPACKED: host.unpack_share.value,
            UNPACKED_BY_KERNEL: host.compiled_unpack_share.value,
        }
        bandwidth = host.bandwidth_bytes_per_s.value
        times = (host.launch_s.value, host.python_s.value, host.gap_s.value)
        return cls(bandwidth, rates, *times, shares)

    def of_dtype(self, dtype: str) -> float:
        """Return the matrix rate of a dtype; the fastest known where it was not measured."""
        return self.flop_per_s.get(dtype) or max(self.flop_per_s.values())


UNTYPED, UNPACKED, UNPACKED_BY_KERNEL = "none", "4-bit", "4-bit, compiled"


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOP and bytes of one operator."""

    flop: int
    moved: tuple[int, ...]
    """Bytes of each tensor read or written."""
    dtype: str


def weight_of_4bit(args: Any) -> tuple[int, int]:
    """Return rows and columns of the matrix behind a `bitsandbytes::gemm_4bit`."""
    rows, columns = args[2]
    return rows, columns


@cache
def is_4bit_product(func: Any) -> bool:
    """Return whether an operator multiplies by a 4-bit matrix."""
    return str(func).startswith("bitsandbytes.gemm_4bit")


VARLEN_PRODUCTS = {aten._flash_attention_forward: 2, aten._flash_attention_backward: 5}
"""Products of queries and keys, or the like, in attention over documents laid end to end."""

SEEN = 4
"""A token sees about a quarter of the longest document: short ones fill a kernel's blocks badly."""

IN_PLACE = {aten.addmm_: aten.addmm}
"""Products that compiled layers add up, and what torch counts them as."""

PADDED = "aten._scaled_dot_product"
"""Prefix of the names of all operators of attention over padded rows."""


def count_flop(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the floating-point operations of an operator; elementwise ones do not count.

    Letters: N tokens of all documents, B rows, H heads, T tokens of a row, D head size.
    """
    if is_4bit_product(func):
        rows, columns = weight_of_4bit(args)
        tokens: int = args[0].numel() // columns
        return 2 * tokens * rows * columns
    if str(func).startswith("bitsandbytes.int8_linear_matmul"):
        return int(2 * args[0].numel() * len(args[1]))
    packet: Any = getattr(func, "overloadpacket", None)
    packet = IN_PLACE.get(packet, packet)
    if packet in VARLEN_PRODUCTS:
        forward = packet is aten._flash_attention_forward
        query, longest = (args[0], args[5]) if forward else (args[1], args[8])  # (N, H, D)
        return int(2 * VARLEN_PRODUCTS[packet] * query.numel() * longest // SEEN)
    if str(packet).startswith(PADDED):  # counted here, as torch 2.11 refuses heads that share keys
        backward = str(packet).endswith("backward")
        query, key = args[1:3] if backward else args[:2]  # (B, H, T, D)
        return int(2 * (5 if backward else 2) * query.numel() * key.shape[-2])
    counter = flop_registry.get(packet)
    return int(counter(*args, **kwargs, out_val=result)) if counter else 0


def count_moved(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, ...]:
    """Return the bytes of each tensor read and written; a view moves nothing."""
    if getattr(func, "is_view", False):
        return ()
    tensors = (t for t in tree_iter((result, args, kwargs)) if isinstance(t, Tensor))
    return tuple(_bytes_of(tensor) for tensor in tensors)


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def kernel_cost(read: Sequence[Tensor], written: Sequence[Tensor], *, unpacks: bool) -> Cost:
    """Return the cost of a generated kernel.

    Args:
        read: Tensors of any shapes.
        written: Tensors of any shapes.
        unpacks: It writes a 4-bit matrix out.
    """
    moved = tuple(map(_bytes_of, (*read, *written)))
    return Cost(0, moved, UNPACKED_BY_KERNEL if unpacks else UNTYPED)


def unpack_cost(packed: Tensor, weight: Tensor) -> Cost:
    """Return the cost of writing a 4-bit matrix out, (rows, columns), before it is multiplied."""
    return Cost(0, (_bytes_of(packed), _bytes_of(weight)), UNPACKED)


def operator_cost(func: Any, args: Any, kwargs: Any, result: Any) -> Cost:
    """Return the cost of one operator."""
    written = args if result is None else result  # an optimizer's update writes over its arguments
    first = next((t for t in tree_iter(written) if isinstance(t, Tensor)), None)
    if first is None:
        return Cost(0, (), UNTYPED)
    flop = count_flop(func, args, kwargs, result)
    moved = count_moved(func, args, kwargs, result)
    unpacks = writes_4bit_out(func)
    return Cost(flop, moved, UNPACKED if unpacks else str(first.dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted time of each piece of work, (W,)."""

    device: Floats
    launch: Floats
    """Time that the processor takes to launch it."""
    python_s: float
    """Time that the processor takes in a micro-batch besides."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of many operators, each (W,)."""

    flop: Floats
    moved: Floats
    """Bytes."""
    dtypes: list[str]

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Costs:
        """Put the costs of operators side by side."""
        flop = np.array([cost.flop for cost in costs], dtype=np.float64)
        moved = np.array([sum(cost.moved) for cost in costs], dtype=np.float64)
        return cls(flop, moved, [cost.dtype for cost in costs])

    def seconds(self, rates: Rates | None, repeats: Floats | float = 1.0) -> Seconds | None:
        """Return the predicted time of each operator; None where the host's rates are not known.

        Args:
            rates: The host's.
            repeats: Runs of each operator, (W,).
        """
        if rates is None:
            return None
        flop_per_s = np.array([rates.of_dtype(dtype) for dtype in self.dtypes])
        share = np.array([rates.shares.get(dtype, 1.0) for dtype in self.dtypes])
        moving_s = self.moved / (rates.bytes_per_s * share)
        is_launched: Floats = np.where(self.moved > 0, repeats, 0.0)
        each: Floats = np.maximum(self.flop / flop_per_s, moving_s) * repeats
        device, launch = each + is_launched * rates.gap_s, is_launched * rates.launch_s
        return Seconds(device, launch, rates.python_s)


# Results of operators on `meta`, kept by their shapes

_ALWAYS_RUN = {
    aten.embedding_dense_backward.default,  # the tracker wants to know its result
    aten._unsafe_view.default,  # its schema does not say that it gives a view
}

MOST = 50_000
"""Operators kept; a trace has a few hundred that differ."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

Run = Callable[[Any, Any, Any], Any]


def layout_of(tensor: Tensor) -> Layout:
    """Return what a tensor of any shape is made again by."""
    return tensor.shape, tensor.stride(), tensor.dtype


def made_of(layouts: Sequence[Layout]) -> list[Tensor]:
    """Return new tensors on `meta`."""
    return [
        torch.empty_strided(size, stride, dtype=dtype, device="meta")
        for size, stride, dtype in layouts
    ]


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return layout_of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _answer(func: Any, args: Any, result: Any) -> Run | None:
    """Return what answers in an operator's place; None where it has to run each time."""
    results = result if isinstance(result, tuple) else (result,)
    if func in _ALWAYS_RUN or not all(isinstance(r, Tensor) and r.is_meta for r in results):
        return None
    schema = schema_of(func)
    if all(part.alias_info is None for part in (*schema.arguments, *schema.returns)):
        layouts, is_one = tuple(map(layout_of, results)), len(schema.returns) == 1
        return lambda *_: made_of(layouts)[0] if is_one else tuple(made_of(layouts))
    if result is args[0] and torch.Tag.inplace_view not in func.tags:
        return lambda _, args, __: args[0]  # writes over it
    return None


class OpCache:
    """Answers, and costs, by operator and shapes of its arguments.

    A trace runs the same few operators for each layer and micro-batch, and torch takes 0.1 to 1 ms
    to find the shape of one result.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Run | None, Cost]] = {}

    def run(self, func: Any, args: Any, kwargs: Any, run: Run) -> tuple[Any, Cost]:
        """Return an operator's result and cost.

        Args:
            func: An overload of an operator.
            args: Its arguments, tensors of any shapes among them.
            kwargs: Its named arguments.
            run: Runs it.
        """
        key = func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
        if key in self._known:
            answer, cost = self._known[key]
            return (answer or run)(func, args, kwargs), cost
        if len(self._known) >= MOST:
            self._known.clear()
        result = run(func, args, kwargs)
        cost = operator_cost(func, args, kwargs, result)
        self._known[key] = _answer(func, args, result), cost
        return result, cost


SHARED = OpCache()
"""Kept for every trace of this process: results depend on operator and shapes alone."""
