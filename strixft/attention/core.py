"""Attention as our models call it.

The form of the mask decides the operator: cumulative lengths, a block mask, T × T truths, or none.
On `meta`, where torch would fall back to the mathematical path that keeps T × T scores, it is the
operator of the device planned for.

Shapes: B rows, H heads, T tokens, D head size, N documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from strixft.attention import recorder
from strixft.attention.sinks import VarlenWithSinks, flex_with_sinks

NAME = "strixft"
"""The name for `attn_implementation`."""

EAGER_NAME = "strixft-eager"
"""The same with plain products and softmax."""

aten = torch.ops.aten

_planned_device = "cpu"

_kernels: str | None = None


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Let attention on `meta` be, in this block, what it would be on `cpu` or `cuda`."""
    global _planned_device
    before, _planned_device = _planned_device, device  # the compiler cannot read a ContextVar
    try:
        yield
    finally:
        _planned_device = before


def use_kernels(name: str | None) -> None:
    """Let flash attention of this process take kernels of torch's registry, such as `FA4`.

    None for torch's own again.
    """
    global _kernels
    if name == _kernels:
        return
    if name is not None:
        nn.attention.activate_flash_attention_impl(name)
    elif restore := getattr(nn.attention, "restore_flash_attention_impl", None):
        restore()
    _kernels = name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention by the operator that its mask asks for.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, fewer H, T, D).
        value: As `key`.
        attention_mask: Lengths (1, 1, 1, N + 1) in int32, a block mask, truths (B, 1, T, T), or
            None for plain causal attention.
        scaling: Factor of the scores; 1/√D if not given.
        s_aux: Learned sinks, (H,).
        options: All else that transformers passes on.

    Returns:
        (B, T, H, D), and no weights.
    """
    if recorder.watch is not None:
        asked = options | {"s_aux": s_aux}
        return recorder.watch.attend(module, query, key, value, attention_mask, asked), None
    if isinstance(attention_mask, BlockMask):
        if s_aux is not None:
            output = flex_with_sinks(module, query, key, value, attention_mask, scaling, s_aux)
            return output, None
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )[0], None
    if attention_mask is not None and attention_mask.dtype is torch.int32:
        longest = options.get("max_length_q") or query.shape[2]
        window = options.get("sliding_window")
        lengths = attention_mask.flatten()
        return varlen(query, key, value, lengths, longest, scaling, window, s_aux), None
    if s_aux is not None:
        return attend_eagerly(
            module, query, key, value, attention_mask, scaling, s_aux=s_aux, **options
        )
    if query.is_meta:
        output = _on_meta(query, key, value, attention_mask, scaling)
        return output.transpose(1, 2).contiguous(), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return attended


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the same by plain products and a softmax in float32; shapes as `attend`.

    Scores are softcap × tanh(scores / softcap), where there is one.
    """
    key, value = _for_each_query(query, key, value)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)  # (B, H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = attention_mask
    if seen is None:
        cached = scores.shape[-1] - scores.shape[-2]  # tokens that all queries come after
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(cached)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    length = scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :length]
    return (weights @ value).transpose(1, 2).contiguous(), None


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute flash attention over documents laid end to end.

    Args:
        query: (B, H, T, D).
        key: (B, fewer H, T, D).
        value: As `key`.
        cu_seq_lens: Where documents begin, and the end, (N + 1,).
        longest: Tokens of the longest document, or more.
        scale: Factor of the scores.
        window: Tokens that a token looks back, itself included; None for all.
        sinks: Learned sinks, (H,).

    Returns:
        (B, T, H, D).
    """
    rows, _, length, size = query.shape
    narrow = value.shape[-1]
    if narrow != size:  # flash attention has one size for all: columns of zeros give zeros
        value = nn.functional.pad(value, (0, size - narrow))
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # (B·T, H, D)
    limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    output: Tensor
    if sinks is not None:
        output = VarlenWithSinks.apply(  # type: ignore[no-untyped-call]
            *flat, sinks, cu_seq_lens, longest, scale, limits
        )
    else:
        output = aten._flash_attention_forward(
            *flat, cu_seq_lens, cu_seq_lens, longest, longest, 0.0, True, False, scale=scale,
            **limits,
        )[0]  # fmt: skip
    return output.view(rows, length, *output.shape[1:])[..., :narrow]


# On `meta`: the operators of the device planned for


def _on_meta(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return what attention would on the planned device, (B, H, T, D), and keep as much of it."""
    on_cpu, is_narrow = _planned_device == "cpu", value.shape[-1] != query.shape[-1]
    if mask is None and not is_narrow:
        if on_cpu:
            operator, options = aten._scaled_dot_product_flash_attention_for_cpu, {}
        else:
            operator = aten._scaled_dot_product_flash_attention
            options = {"return_debug_mask": False}
        output: Tensor = operator(query, key, value, 0.0, True, **options, scale=scale)[0]
        return output
    key, value = _for_each_query(query, key, value)  # as transformers does where there is a mask
    if is_narrow and (on_cpu or mask is None):  # no kernel has values of another size than queries
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device="meta").tril()
        scores = (query @ key.transpose(2, 3)) * (scale or query.shape[-1] ** -0.5)  # (B, H, T, T)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
    assert mask is not None
    bias = torch.zeros_like(mask, dtype=query.dtype)  # (B, 1, T, T): torch makes one in each call
    if on_cpu:
        operator = aten._scaled_dot_product_flash_attention_for_cpu
        output = operator(query, key, value, 0.0, False, attn_mask=bias, scale=scale)[0]
    else:
        bias = bias.expand(-1, query.shape[1], -1, -1)
        operator = aten._scaled_dot_product_efficient_attention
        output = operator(query, key, value, bias, True, 0.0, False, scale=scale)[0]
    return output


def _for_each_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values (B, fewer H, T, D) for each head of the queries: (B, H, T, D)."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    NAME: attend,
    EAGER_NAME: attend_eagerly,
}
"""Attention by `AttentionBackend.implementation`; `interface` registers it with transformers."""
