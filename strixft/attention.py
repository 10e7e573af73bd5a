"""Attention as our models call it, through transformers' attention interface.

On a device it is torch's `scaled_dot_product_attention`. On `meta`, where torch would fall back to
the mathematical path that keeps T × T scores, it is the operator of the device planned for.

Shapes: B rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "strixft"
"""What `attn_implementation` is called."""

aten = torch.ops.aten
_planned_device: ContextVar[str] = ContextVar("planned_device", default="cpu")


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within this block, attention on `meta` is what it would be on a device.

    Args:
        device: `cpu` or `cuda`.
    """
    token = _planned_device.set(device)
    try:
        yield
    finally:
        _planned_device.reset(token)


def _on_meta(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    if _planned_device.get() == "cpu":
        operator, options = aten._scaled_dot_product_flash_attention_for_cpu, {}
    else:
        operator, options = aten._scaled_dot_product_flash_attention, {"return_debug_mask": False}
    output: Tensor = operator(query, key, value, 0.0, True, **options, scale=scale)[0]
    return output  # (B, H, T, D)


def _masked_on_meta(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """With a mask, transformers repeats K and V, and torch turns the mask into a bias per call."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = torch.zeros_like(mask, dtype=query.dtype)  # (B, 1, T, T)
    if _planned_device.get() == "cpu":
        operator = aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = operator(query, key, value, 0.0, False, attn_mask=bias, scale=scale)[0]
    else:
        bias = bias.expand(-1, query.shape[1], -1, -1)
        operator = aten._scaled_dot_product_efficient_attention
        output = operator(query, key, value, bias, True, 0.0, False, scale=scale)[0]
    return output  # (B, H, T, D)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, fewer H, T, D).
        value: As `key`.
        attention_mask: (B, 1, T, T), or None for plain causal attention.
        scaling: Factor of the scores; 1/√D if not given.
        options: What else transformers passes on.

    Returns:
        (B, T, H, D), and no weights.
    """
    if query.is_meta:
        output = (
            _on_meta(query, key, value, scaling)
            if attention_mask is None
            else _masked_on_meta(query, key, value, attention_mask, scaling)
        )
        return output.transpose(1, 2).contiguous(), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return attended


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
