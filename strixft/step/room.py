"""Room beside frozen weights, into which compiled layers write an adapter's factors.

There a product of both needs no copy of the weights (`strixft.step.joined`). It takes 3·r columns
and as many rows more, filled up to a multiple of 64: of 4,096 columns and a rank of 16 1.6 % each.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from strixft.step.layers import decoder_layers

ALIGNED = 64
"""Rows of joined matrices begin at multiples of so many elements."""
SHARING = 3
"""Matrices of one input, whose factors lie beside each other: q, k and v."""


def give_room(model: nn.Module) -> None:
    """Move the frozen, unquantised weights under adapters to where there is room beside them.

    Args:
        model: What `model.build` gave.
    """
    module: Any
    for module in decoder_layers(model).modules():
        base = module.base_layer if isinstance(module, LoraLayer) else None
        if type(base) is nn.Linear and not base.weight.requires_grad:
            add_room(base.weight, SHARING * max(module.r.values()))


@torch.no_grad()
def add_room(weight: Tensor, least: int) -> None:
    """Move a weight to where there is room beside it, unless there is.

    Args:
        weight: Of a linear layer; it stays the same tensor, with another stride.
        least: Columns, and rows.
    """
    rows, columns = weight.shape
    room = least + -(columns + least) % ALIGNED
    if room_of(weight) >= room:
        return
    whole = weight.new_empty(rows + room, columns + room)
    weight.data = whole[:rows, :columns].copy_(weight)
    if weight.is_cuda:
        torch.cuda.empty_cache()  # where it was nothing of this size fits


def room_of(weight: Tensor) -> int:
    """Columns beside a weight, and rows below it, that are room; also of a transposed one."""
    weight = weight if weight.stride(1) == 1 else weight.T
    return weight.stride(0) - weight.shape[1] if weight.stride(1) == 1 else 0
