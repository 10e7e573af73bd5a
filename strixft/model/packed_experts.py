"""Experts of a mixture in 4 bits, written out a few at a time inside their products.

bitsandbytes packs linear layers only. Here each expert's matrix is packed as it would pack it
alone: NF4 in blocks of 64, their scales in 8 bits (arXiv:2305.14314). MXFP4, in which gpt-oss
comes, is kept as it is. The numbers of an expert lie together, the expert is dimension 0.

Shapes: E experts, A rows and B columns of a matrix, S rows of tokens sorted by expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from strixft.model.bitsandbytes_import import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)
from strixft.model.experts import fused_experts, is_grouped, parameters_of

BLOCK, SCALES_BLOCK = 64, 256
"""Numbers of NF4 that share a scale; scales that share one of their own."""

MX_BLOCK, MX_BIAS = 32, 127
"""Numbers of MXFP4 that share a power of two; its exponent is stored with this added."""

PIECE_BYTES = 2**28
"""Most that is written out at once, if one expert is no larger."""

Kind = Literal["nf4", "mxfp4"]

Tensors = Sequence[Tensor]
"""NF4 has `codes`, `scales`, `sums` and `offsets`; MXFP4 `codes` and `scales`."""


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of NF4's codes and those of 8-bit scales."""
    values: Tensor = get_4bit_type("nf4", device=device)
    return values, create_dynamic_map().to(device)


MX_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of MXFP4's codes; those of the codes with the fourth bit are negative.

Source: OCP Microscaling Formats 1.0, section 5.3.3 (E2M1)."""


def buffers_of(kind: Kind, shape: torch.Size) -> dict[str, Tensor]:
    """Return empty tensors for matrices (E, A, B): `codes` has two numbers a byte.

    Of NF4 there are `scales`, one a block; `sums`, scales of the scales; `offsets`, the mean scale
    of an expert. Of MXFP4 `scales` are exponents.
    """
    experts, numbers = shape[0], shape[1] * shape[2]
    codes = torch.empty(experts, numbers // 2, dtype=torch.uint8)
    if kind == "mxfp4":
        scales = torch.empty(experts, numbers // MX_BLOCK, dtype=torch.uint8)
        return {"codes": codes, "scales": scales}
    blocks = numbers // BLOCK
    return {
        "codes": codes,
        "scales": torch.empty(experts, blocks, dtype=torch.uint8),
        "sums": torch.empty(experts, -(-blocks // SCALES_BLOCK)),
        "offsets": torch.empty(experts),
    }


class PackedExperts(nn.Module):
    """The matrices of all experts in 4 bits.

    Args:
        shape: E, A and B of the parameter that they stand for.
        dtype: Type in which the model computes.
        kind: Format of the numbers.
        flipped: Each matrix is stored as (B, A).
    """

    codes: Tensor
    """Two numbers a byte; see `buffers_of` for the other tensors."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: Kind = "nf4",
        *,
        flipped: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.kind, self.flipped = torch.Size(shape), dtype, kind, flipped
        experts, rows, columns = shape
        self.stored = torch.Size((experts, columns, rows) if flipped else shape)
        for name, buffer in buffers_of(kind, self.stored).items():
            self.register_buffer(name, buffer)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [buffer for _, buffer in self.named_buffers()]

    def __getitem__(self, expert: Any) -> Tensor:
        """Return one expert's matrix, (A, B): transformers' own loop over experts asks for it."""
        return self.written_out(slice(int(expert), int(expert) + 1), self.dtype)[0]

    def written_out(self, some: slice, dtype: torch.dtype) -> Tensor:
        """Return the matrices of some experts, (n, A, B)."""
        chosen = [tensor[some] for tensor in self.tensors]
        shape = torch.Size((len(chosen[0]), *self.stored[1:]))
        found = written_out(chosen, shape, dtype, self.kind)
        return found.mT if self.flipped else found

    def product(self, rows: Tensor, ends: Tensor, *, transposed: bool) -> Tensor:
        """Return rows times their experts' matrices, or the transposed ones, (S, B or A).

        Args:
            rows: (S, A), or (S, B).
            ends: Row behind the last one of each expert, (E,), int32.
            transposed: Multiply by (B, A).
        """
        other_way = transposed is not self.flipped
        shape = list(self.stored)
        found: Tensor = packed_product(rows, self.tensors, ends, shape, other_way, self.kind)
        return found

    def draw(self, device: str) -> None:
        """Take random codes, all with a scale near 0.05, on a device."""
        for name, buffer in list(self.named_buffers()):
            fresh = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(self, name, fresh)
        self.codes.random_(0, 256)
        if self.kind == "nf4":
            self.get_buffer("offsets").fill_(0.05)
        else:
            self.get_buffer("scales").fill_(MX_BIAS - 6)


def can_pack(weights: Tensor) -> bool:
    """Return whether each expert's matrix, of (E, A, B), consists of whole blocks."""
    return weights.ndim == 3 and weights[0].numel() % BLOCK == 0


@torch.no_grad()
def packed(weights: Tensor) -> dict[str, Tensor]:
    """Return the tensors of `PackedExperts` in NF4 that stand for matrices, (E, A, B)."""
    rows: dict[str, list[Tensor]] = {"codes": [], "scales": [], "sums": [], "offsets": []}
    for matrix in weights:
        codes, state = quantize_4bit(
            matrix.contiguous(), compress_statistics=True, quant_type="nf4"
        )
        stored = (codes.flatten(), state.absmax, state.state2.absmax, state.offset)
        for row, tensor in zip(rows.values(), stored, strict=True):
            row.append(tensor)
    return {name: torch.stack(row) for name, row in rows.items()}


def written_out(
    tensors: Tensors, shape: torch.Size, dtype: torch.dtype, kind: Kind = "nf4"
) -> Tensor:
    """Return the matrices of some experts, (n, A, B), of their rows in the stored tensors."""
    if kind == "mxfp4":
        return _from_mxfp4(tensors[0], tensors[1], dtype).view(shape)
    codes, scales, sums, offsets = tensors
    values, of_scales = _tables(codes.device)
    inner = of_scales[scales.int()]
    inner = inner * sums.repeat_interleave(SCALES_BLOCK, 1)[:, : inner.shape[1]]
    absmax = (inner + offsets.unsqueeze(1)).flatten()
    # bitsandbytes 0.50 takes scales of other blocks on a CPU where a row is not of whole ones
    blocks = torch.Size((shape.numel() // BLOCK, BLOCK))
    state = QuantState(absmax, blocks, values, BLOCK, "nf4", dtype)
    found: Tensor = dequantize_4bit(codes.reshape(-1, 1), state)
    return found.view(shape)


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two numbers of MXFP4 that each byte holds, (256, 2)."""
    values = torch.tensor((*MX_VALUES, *(-one for one in MX_VALUES)), dtype=dtype, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack([values[codes & 15], values[codes >> 4]], dim=1)  # the low bits come first


def _from_mxfp4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers, (n, A B), of codes, (n, A B / 2), and exponents, (n, A B / 32)."""
    numbers = _pairs(codes.device, dtype)[codes.int()].view(*scales.shape, MX_BLOCK)
    powers = (scales.int() << 23).view(torch.float32)  # an exponent as float32 stores it
    return numbers.mul_(powers.to(dtype).unsqueeze(-1)).flatten(1)


def experts_at_once(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return how many experts of matrices (E, A, B) are written out at once."""
    return min(shape[0], max(1, PIECE_BYTES // (shape[1] * shape[2] * dtype.itemsize)))


@torch.library.custom_op("strixft::packed_product", mutates_args=())
def packed_product(
    rows: Tensor, tensors: list[Tensor], ends: Tensor, shape: list[int], transposed: bool, kind: str
) -> Tensor:
    """Compute `PackedExperts.product`; waits for the device once, to know the groups."""
    found = rows.new_empty(len(rows), shape[1] if transposed else shape[2])
    places, step = [0, *ends.tolist()], experts_at_once(shape, rows.dtype)
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        start, end = places[first], places[last]
        if start == end:
            continue
        size = torch.Size((last - first, *shape[1:]))
        chosen = [tensor[first:last] for tensor in tensors]
        weights = written_out(chosen, size, rows.dtype, cast("Kind", kind))
        weights = weights.mT if transposed else weights
        if is_grouped(rows, weights):
            found[start:end] = grouped_mm(rows[start:end], weights, offs=ends[first:last] - start)
            continue
        for expert in range(first, last):
            group = slice(places[expert], places[expert + 1])
            torch.mm(rows[group], weights[expert - first], out=found[group])
    return found


@packed_product.register_fake
def _(
    rows: Tensor, tensors: list[Tensor], ends: Tensor, shape: list[int], transposed: bool, kind: str
) -> Tensor:
    return rows.new_empty(len(rows), shape[1] if transposed else shape[2])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, tensors, ends, ctx.shape, ctx.transposed, ctx.kind = inputs
    ctx.save_for_backward(ends, *tensors)


def _go_back(ctx: Any, gradient: Tensor) -> Any:
    ends, *tensors = ctx.saved_tensors
    options = ctx.shape, not ctx.transposed, ctx.kind
    of_rows = packed_product(gradient, tensors, ends, *options)
    return of_rows, [None] * len(tensors), None, None, None, None


packed_product.register_autograd(_go_back, setup_context=_keep)

PACKED_PRODUCT = torch.ops.strixft.packed_product.default


def pack_shape(model: nn.Module, dtype: torch.dtype, kind: Kind = "nf4") -> None:
    """Replace a model's fused experts by packed ones, on `meta` and without their numbers."""
    for experts in fused_experts(model).values():
        for name in parameters_of(experts):
            weights = getattr(experts, name)
            if can_pack(weights):
                delattr(experts, name)
                flipped = kind == "mxfp4" and bool(experts.is_transposed)  # files have (D, C)
                with torch.device("meta"):
                    part = PackedExperts(tuple(weights.shape), dtype, kind, flipped=flipped)
                experts.add_module(name, part)


def packed_in(model: nn.Module) -> dict[str, PackedExperts]:
    """Return the packed experts of a model, by the names that their parameters would have."""
    return {path: part for path, part in model.named_modules() if isinstance(part, PackedExperts)}


@contextlib.contextmanager
def shown_as_parameters(model: nn.Module) -> Iterator[None]:
    """Let PEFT see packed experts as parameters of their whole shape, which take no memory."""
    found = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], part)
        for path, part in packed_in(model).items()
    ]
    for experts, name, part in found:
        empty = torch.empty(1, dtype=part.dtype, device=part.codes.device).expand(part.shape)
        delattr(experts, name)
        experts.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        for experts, name, part in found:
            delattr(experts, name)
            experts.add_module(name, part)
