"""Linear layers over a frozen base of 4-bit or 8-bit numbers: on `meta`, loaded, and drawn.

4 bits are QLoRA's NF4 (arXiv:2305.14314), 8 bits the integers of LLM.int8 (arXiv:2208.07339): one
byte a weight and a float32 scale a row, as bitsandbytes makes both. The product of 8-bit layers is
our own: its operators all have results of shapes known beforehand, and it saves no activation for
backward, as bitsandbytes' does even if the layer will be recomputed.

Shapes: N tokens, C channels in, D channels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strixft.catalog.methods import Method
from strixft.model.bitsandbytes_import import (
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    Params4bit,
    QuantState,
)
from strixft.model.packed_experts import PackedExperts, pack_shape

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
"""QLoRA's storage (section 3)."""

OUTLIERS = 32
"""Input channels with the largest values, which are multiplied unrounded. LLM.int8 finds at most 7
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


def finish_loaded(model: nn.Module) -> None:
    """Make the layers that transformers loaded compute as training needs them.

    8-bit layers use the product of this module. 4-bit layers keep the bytes that are trained on,
    saved and merged: bitsandbytes 0.50 packs them again in evaluation on a CPU with AVX512-BF16,
    where it rounds the scales to bf16 and fails at input sizes that are not multiples of 64
    (`Linear4bit.forward`).
    """
    layer: Any
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        elif type(layer) is Linear8bitLt:
            scales = layer.weight.SCB
            layer.init_8bit_state()
            layer.__class__ = Int8Linear
            layer.register_buffer("scales", scales, persistent=False)


def _empty(size: int | tuple[int, ...], kind: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=kind, device="meta")


def int8_shape(linear: nn.Linear) -> nn.Module:
    """Return an 8-bit layer of the shape of a layer, on `meta`."""
    layer = Int8Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    integers = torch.empty_like(linear.weight, dtype=torch.int8)
    scales = _empty(linear.out_features)
    layer.weight = Int8Params(integers, requires_grad=False)
    layer.state.CB, layer.state.SCB = integers, scales
    layer.register_buffer("scales", scales, persistent=False)
    return layer


def _nf4_weight(packed: Tensor, state: Any) -> Any:
    """Return the weight of a 4-bit layer from what `quantize_4bit` returns."""
    return Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True
    )


def _nf4_shape(linear: nn.Linear, dtype: torch.dtype, *, nested: bool) -> nn.Module:
    """Return a 4-bit layer of this shape on `meta`; nested: its scales are quantised too."""
    layer: nn.Module = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    # `quantize_4bit` of bitsandbytes 0.50 would keep its table on `meta` for all that comes after.
    blocks = -(-linear.weight.numel() // 64)
    code, inner, offset = _empty(16), None, None
    if nested:
        offset, inner_code = _empty(()), _empty(256)
        inner = QuantState(_empty(-(-blocks // 256)), None, inner_code, 256, None, torch.float32)
    scales = _empty(blocks, torch.uint8 if nested else torch.float32)
    state = QuantState(scales, linear.weight.shape, code, 64, "nf4", dtype, offset, inner)
    packed = _empty((-(-linear.weight.numel() // 2), 1), torch.uint8)
    layer.weight = _nf4_weight(packed, state)
    return layer


def quantise_shape(
    model: nn.Module, method: Method, dtype: torch.dtype, stored: Mapping[str, Any]
) -> None:
    """Replace the layers of a model on `meta` that its method quantises.

    Args:
        model: The base.
        method: A row whose base is not `native`.
        dtype: Type in which it computes.
        stored: The quantisation of a checkpoint that lists the layers which stay; else empty.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    if stored.get("quant_method") == "mxfp4":  # all else stays as the file has it
        pack_shape(model, dtype, "mxfp4")
        return
    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped = stored.get("llm_int8_skip_modules")
    nested = stored.get("bnb_4bit_use_double_quant", True)
    for name, linear in list(model.named_modules()):
        kept = linear is head if skipped is None else not should_convert_module(name, skipped)
        if type(linear) is nn.Linear and not kept:
            is_nf4 = method.base == "nf4"
            layer = _nf4_shape(linear, dtype, nested=nested) if is_nf4 else int8_shape(linear)
            if linear.bias is not None:
                layer.bias = nn.Parameter(torch.empty_like(linear.bias))
            model.set_submodule(name, layer)
    if method.base == "nf4":
        pack_shape(model, dtype)
    setattr(model, f"is_loaded_in_{4 if method.base == 'nf4' else 8}bit", True)  # PEFT asks for it
    finish_loaded(model)


def _random(tensor: Tensor, device: str) -> Tensor:
    """Return a random tensor of the same shape and type; floats are drawn from N(0, 0.02²)."""
    if tensor.dtype in (torch.uint8, torch.int8):
        limits = torch.iinfo(tensor.dtype)
        return torch.randint(
            limits.min, limits.max + 1, tensor.shape, dtype=tensor.dtype, device=device
        )
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(std=0.02)


def _draw_state(state: Any, device: str) -> None:
    for name, value in list(vars(state).items()):
        if isinstance(value, Tensor):
            setattr(state, name, _random(value, device))
    if state.state2 is not None:
        _draw_state(state.state2, device)


def draw_weights(model: nn.Module, device: str) -> None:
    """Give a model on `meta` random weights on a device, and buffers of ones."""
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.draw(device)
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            drawn, state = _random(weight, device), getattr(weight, "quant_state", None)
            if state is None:
                fresh = nn.Parameter(drawn, requires_grad=weight.requires_grad)
            else:
                _draw_state(state, device)
                fresh = _nf4_weight(drawn, state)
            module.register_parameter(name, fresh)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.ones(buffer.shape, dtype=buffer.dtype, device=device))
    model.tie_weights()  # type: ignore[operator]
