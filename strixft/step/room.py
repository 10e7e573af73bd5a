"""Room beside frozen weights, into which compiled layers write an adapter's factors.

There a product of both needs no copy of the weights (`strixft.step.joined`). It takes 64 columns
and 64 rows, and what fills those up to a multiple of 64: of 4,096 columns 1.6 %.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from strixft.model.adapter import decoder_layers

ALIGNED = 64
"""Rows of joined matrices begin at multiples of so many elements."""

ROOM = 64
"""Most ranks of adapters that lie beside a weight: of q, k and v, or of one."""


def give_room(model: nn.Module) -> None:
    """Move the frozen, unquantised weights under adapters to where there is room beside them.

    Args:
        model: What `model.build` gave.
    """
    module: Any
    for module in decoder_layers(model).modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            add_room(module.base_layer.weight)


def _is_plain(module: Any) -> bool:
    """Whether its product and that of its base are added up; DoRA's are not."""
    base, rank = module.base_layer, max(module.r.values(), default=0)
    is_frozen = type(base) is nn.Linear and not base.weight.requires_grad
    return is_frozen and rank <= ROOM and not module.lora_magnitude_vector


@torch.no_grad()
def add_room(weight: Tensor) -> None:
    """Move a weight to where there is room beside it, unless it has been.

    Args:
        weight: Of a linear layer; it stays the same tensor, with another stride.
    """
    rows, columns = weight.shape
    room = ROOM + -columns % ALIGNED
    size = rows + room, columns + room
    if _is_corner(weight, size):
        return
    weight.data = weight.new_empty(size)[:rows, :columns].copy_(weight)
    if weight.is_cuda:
        torch.cuda.empty_cache()  # where it was nothing of this size fits


def _is_corner(weight: Tensor, size: tuple[int, int]) -> bool:
    """Whether it lies at the beginning of a matrix of that size."""
    elements = weight.untyped_storage().nbytes() // weight.element_size()
    is_first = weight.storage_offset() == 0 and weight.stride() == (size[1], 1)
    return is_first and elements == size[0] * size[1]


def room_of(weight: Tensor) -> int:
    """Columns beside a weight, and rows below it, that are room; also of a transposed one."""
    weight = weight if weight.stride(1) == 1 else weight.T
    return weight.stride(0) - weight.shape[1] if weight.stride(1) == 1 else 0
