"""Operators for matrices that lie beside each other, and what the compiler generates for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as replace_fields
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import full, register_lowering

torch.library.define("strixft::beside", "(Tensor[] parts, int dim, int room) -> Tensor")

_FILL = "(Tensor(a!) whole, Tensor part, int dim, int start)"

torch.library.define("strixft::fill", _FILL + " -> Tensor(a!)")

torch.library.define("strixft::fill_in_place", _FILL + " -> ()")

BESIDE = torch.ops.strixft.beside.default
"""Matrices behind each other along a dimension, each written there by the kernel that makes it, and
room for more."""

FILL = torch.ops.strixft.fill.default
"""Writes a matrix into rows (0) or columns (1) of another one."""


@torch.library.impl("strixft::beside", "CompositeExplicitAutograd")
def _beside(parts: list[Tensor], dim: int, room: int) -> Tensor:
    shape = [room if side == dim else size for side, size in enumerate(parts[0].shape)]
    return torch.cat([*parts, parts[0].new_empty(shape)], dim)


@torch.library.impl("strixft::fill_in_place", "CompositeExplicitAutograd")
def _fill_in_place(whole: Tensor, part: Tensor, dim: int, start: int) -> None:
    whole.narrow(dim, start, part.shape[dim]).copy_(part)


@torch.library.impl("strixft::fill", "CompositeExplicitAutograd")
def _fill(whole: Tensor, part: Tensor, dim: int, start: int) -> Tensor:
    torch.ops.strixft.fill_in_place(whole, part, dim, start)
    return whole


@register_lowering(BESIDE, type_promotion_kind=None)
def _generate_beside(parts: list[Any], dim: int, room: int) -> Any:
    """What the compiler generates for it: its own `cat` may choose one kernel for all parts."""
    return ir.TensorBox(ir.ConcatKernel.create([*parts, *_room(parts[0], dim, room)], dim))


def _room(like: Any, dim: int, room: int) -> Iterator[Any]:
    """A part that no kernel writes, as the compiler's `empty_strided` makes it."""
    if room:
        size = [room if side == dim else n for side, n in enumerate(like.get_size())]
        part = full(size, 0, dtype=like.get_dtype(), device=like.get_device())
        part.realize()
        made = part.data.data
        made.data = replace_fields(made.data, ranges=[0] * len(size))
        yield part


@register_lowering(FILL, type_promotion_kind=None)
def _generate_fill(whole: Any, part: Any, dim: int, start: int) -> Any:
    """By an operator that returns nothing: a result would keep the matrix while the code runs."""
    ir.FallbackKernel.create(torch.ops.strixft.fill_in_place.default, whole, part, dim, start)
    return whole
