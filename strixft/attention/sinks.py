"""Attention with learned sinks: a share of each head that looks at no token, as gpt-oss has it.

A sink is one more score in the softmax, with a value of zero. So the result is plain attention's,
scaled down; and flash attention's own backward pass is right once it is told the sum with the sink
and the scaled result.

Shapes: B rows, H heads, T tokens of a row, N tokens of all rows, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import (
    compile_friendly_flex_attention,
    get_flex_attention_lse_kwargs,
)

aten = torch.ops.aten


class VarlenWithSinks(torch.autograd.Function):
    """Flash attention over documents laid end to end."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *options: Any
    ) -> Tensor:
        """Return the result, (N, H, D).

        Args:
            ctx: Torch's.
            query: (N, H, D).
            key: (N, fewer H, D).
            value: As `key`.
            sinks: (H,).
            options: Where documents begin, the longest one's tokens, the factor of the scores, and
                keywords of the window.
        """
        ends, longest, scale, window = options
        ctx.options = (longest, longest, 0.0, True), {"scale": scale, **window}
        plain, sums, *state, _ = aten._flash_attention_forward(
            query, key, value, ends, ends, *ctx.options[0], False, **ctx.options[1]
        )
        whole = torch.logaddexp(sums, sinks.float().unsqueeze(1))  # (H, N)
        output: Tensor = (plain * (sums - whole).exp().T.unsqueeze(-1)).to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, whole, ends, *state)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of queries, keys, values and sinks."""
        query, key, value, sinks, output, whole, ends, *state = ctx.saved_tensors
        (gradient,), (sizes, options) = gradients, ctx.options
        found = aten._flash_attention_backward(
            gradient, query, key, value, output, whole, ends, ends, *sizes, *state, **options
        )
        of_sinks = None
        if ctx.needs_input_grad[3]:
            seen = (gradient.float() * output.float()).sum(-1)  # (N, H)
            of_sinks = -(seen * (sinks.float() - whole.T).exp()).sum(0).to(sinks.dtype)
        return *found, of_sinks, None, None, None, None


def flex_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    sinks: Tensor,
) -> Tensor:
    """Compute flex attention; transformers' own rounds the sums of bf16 models to bf16.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, fewer H, T, D).
        value: As `key`.
        mask: Tokens that each token sees.
        scaling: Factor of the scores.
        sinks: (H,).

    Returns:
        (B, T, H, D).
    """
    plain, beside = compile_friendly_flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        training=module.training,
        **get_flex_attention_lse_kwargs(True),
    )
    share = (beside.lse - sinks.float().unsqueeze(1)).sigmoid().unsqueeze(-1)  # (B, H, T, 1)
    output: Tensor = (plain * share).to(query.dtype)
    return output.transpose(1, 2).contiguous()
