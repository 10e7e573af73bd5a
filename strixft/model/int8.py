"""Linear layers over a frozen base of 8-bit integers.

The storage is LLM.int8's (arXiv:2208.07339), as bitsandbytes' `load_in_8bit` makes it: one byte a
weight and a float32 scale a row. The product uses operators whose results all have shapes known
beforehand, and saves no activation for backward: bitsandbytes' own saves its input, even if the
layer will be recomputed.

Shapes: N tokens, C channels in, D channels out.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

OUTLIERS = 32
"""Input channels with the largest values, which are multiplied unrounded. The paper finds at most 7
that need it in a model of 13B (section 3.2)."""

LARGEST = 127
"""Largest of the integers; a row's scale is the largest value it had."""

_int8 = torch.ops.bitsandbytes


def _weight(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (D, C) in a float type, from integers (D, C) and scales (D,)."""
    weight = integers.to(dtype)
    return weight.mul_((scales / LARGEST).unsqueeze(-1).to(dtype))


def _product(x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """Return the product (N, D) of x (N, C) and the transposed weight (D, C)."""
    columns = x.abs().amax(0).topk(min(OUTLIERS, x.shape[1])).indices
    unrounded = (
        x.index_select(1, columns) @ _weight(integers.index_select(1, columns), scales, x.dtype).T
    )
    rest = x.to(torch.float16, copy=True).index_fill_(1, columns, 0)
    rounded, row_scales, _ = _int8.int8_vectorwise_quant(rest)
    del rest
    sums = _int8.int8_linear_matmul(rounded, integers)  # (N, D), int32
    product: Tensor = _int8.int8_mm_dequant(sums, row_scales, scales, dtype=x.dtype)
    return product + unrounded


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(integers, scales)
        product = _product(x.flatten(0, -2), integers, scales)
        return product.view(*x.shape[:-1], len(integers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        integers, scales = ctx.saved_tensors
        return grad @ _weight(integers, scales, grad.dtype), None, None


class Int8Linear(Linear8bitLt):  # type: ignore[misc]
    """A loaded 8-bit layer with the product of this module."""

    scales: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (…, C)
        """Return the product (…, D) in the dtype of the input."""
        y: Tensor = _Int8Linear.apply(x, self.weight, self.scales)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def use_own_product(model: nn.Module) -> None:
    """Make the 8-bit layers that transformers loaded use the product of this module."""
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is Linear8bitLt]
    for layer in layers:
        scales = layer.weight.SCB
        layer.init_8bit_state()
        layer.__class__ = Int8Linear
        layer.register_buffer("scales", scales, persistent=False)


def shape_layer(linear: nn.Linear) -> nn.Module:
    """Return an 8-bit layer of this shape on `meta`."""
    layer = Int8Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    integers = torch.empty_like(linear.weight, dtype=torch.int8)
    scales = torch.empty(linear.out_features, dtype=torch.float32, device="meta")
    layer.weight = Int8Params(integers, requires_grad=False)
    layer.state.CB, layer.state.SCB = integers, scales
    layer.register_buffer("scales", scales, persistent=False)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(linear.bias))
    return layer
