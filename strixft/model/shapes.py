"""The model without weights, on `meta`, with the storage that its method gives them.

Shapes: C channels in, D channels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import Method
from strixft.model import int8
from strixft.model.architecture import (
    architecture_of,
    build_shape,
    keep_layers,
)

IDLE = "strixft_idle"
"""Attribute of a base with its architecture's `idle` layers, which get no adapter."""

_NESTED = "bnb_4bit_use_double_quant"

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", _NESTED: True}
"""QLoRA's storage (arXiv:2305.14314, section 3)."""


def keep_packing(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking the bytes that are trained on, saved and merged.

    bitsandbytes 0.50 packs them again in evaluation on a CPU with AVX512-BF16: it rounds the scales
    to bf16 and fails at input sizes that are not multiples of 64 (`Linear4bit.forward`).
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def nf4_parameter(packed: torch.Tensor, state: Any) -> Any:
    """Return the weight of a loaded 4-bit layer.

    Args:
        packed: Two weights a byte, uint8 (C · D / 2, 1), from `quantize_4bit`.
        state: Scales and shape, from there too.
    """
    import bitsandbytes as bnb

    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True
    )


def _meta_nf4(linear: nn.Linear, dtype: torch.dtype, nested: bool) -> nn.Module:
    """Return a 4-bit layer of this shape on `meta`; nested: its scales are quantised too."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    def empty(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    blocks = -(-linear.weight.numel() // 64)
    inner = QuantState(
        absmax=empty(-(-blocks // 256), torch.float32),
        blocksize=256,
        code=empty(256, torch.float32),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        shape=linear.weight.shape,
        code=empty(16, torch.float32),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=empty(1, torch.float32).squeeze() if nested else None,
        state2=inner if nested else None,
    )
    layer: nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
    layer.weight = nf4_parameter(packed, state)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(linear.bias))
    return layer


def _store_quantised(
    model: nn.Module, method: Method, dtype: torch.dtype, stored: Mapping[str, Any]
) -> None:
    """Replace the layers that are quantised; a quantised checkpoint lists those that are not."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped, nested = stored.get("llm_int8_skip_modules"), stored.get(_NESTED, True)
    for name, module in list(model.named_modules()):
        kept = module is head if skipped is None else not should_convert_module(name, skipped)
        if type(module) is nn.Linear and not kept:
            is_nf4 = method.base == "nf4"
            layer = _meta_nf4(module, dtype, nested) if is_nf4 else int8.shape_layer(module)
            model.set_submodule(name, layer)
    bits = 4 if method.base == "nf4" else 8
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT asks for it


def shape_base(
    config: Any,
    method: Method,
    dtype: torch.dtype,
    *,
    buffers: bool = False,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Build the base model as shapes on `meta`: nothing is loaded or allocated.

    Args:
        config: The model's configuration.
        method: Storage of the base.
        dtype: Type in which it computes.
        buffers: Make real what checkpoints do not hold, such as rotary frequencies.
        layers: Only these of the decoder's layers; default: all.
    """
    from accelerate import init_empty_weights

    empty = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with empty:
        model: nn.Module = build_shape(config, dtype)
    setattr(model, IDLE, architecture_of(config).idle)
    if layers is not None:
        keep_layers(model, layers)
    if buffers:
        model.tie_weights()  # type: ignore[operator]  # accelerate takes ties apart
    if method.base != "native":
        _store_quantised(model, method, dtype, getattr(config, "quantization_config", None) or {})
        keep_packing(model)
    return model
