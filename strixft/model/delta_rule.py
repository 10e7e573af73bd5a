"""The gated delta rule as one operator, and a convolution that keeps documents apart.

Documents that share a row are kept apart by the gate: a state that decays by exp(-40) at the first
token of a document is gone, whichever kernel computes it. So neither needs to know of documents.

Shapes: B rows of T tokens, N documents, H value heads and a divisor of them as key heads, of sizes
V and K; chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from strixft.support.private_torch import gradients_inside

CHUNK = 64
"""C, as in transformers and fla."""

RESET = -40.0
"""Logarithm of what is left of a state at a document's first token: exp(-40) is 4e-18."""

Rule = Callable[..., Tensor]

kernel: list[Rule] = []
"""A package's kernel, which is used in place of `chunked` where there is one."""


def chunked(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor, *, unit: bool
) -> Tensor:
    """Compute the rule chunk by chunk in float32, in any operator's public form.

    Source: arXiv:2412.06464, the WY form of a chunk; as transformers computes it.

    Args:
        query: (B, T, heads, K).
        key: (B, T, heads, K).
        value: (B, T, H, V).
        gate: Logarithm of the decay, (B, T, H).
        beta: Share of a key's old value that is overwritten, (B, T, H).
        unit: Queries and keys are made unit vectors first.

    Returns:
        (B, T, H, V).
    """
    rows, length, heads, size = value.shape
    repeats = heads // key.shape[2]
    query, key = (one.repeat_interleave(repeats, 2) if repeats > 1 else one for one in (query, key))
    query, key, value = (_chunks(one) for one in (query, key, value))  # (B·H, chunks, C, size)
    gate, beta = (_chunks(one.unsqueeze(-1)) for one in (gate, beta))  # (B·H, chunks, C, 1)
    if unit:
        query, key = (one * torch.rsqrt(one.square().sum(-1, True) + 1e-6) for one in (query, key))
    between, since, until = _decays(gate)
    written = beta * key
    sides = torch.cat([beta * value, written * since], -1)
    solved: Tensor = _invert((written @ key.mT) * between) @ sides
    query = query * key.shape[-1] ** -0.5
    values, erased = solved.split([size, key.shape[-1]], -1)
    states, news = _scan(values, erased, (key * until).mT, since[..., -1:, :])
    found = (query * since) @ states + (query @ key.mT * between) @ news
    back: Tensor = found.flatten(1, 2)[:, :length].unflatten(0, (rows, heads)).transpose(1, 2)
    return back


def _decays(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is left between tokens of a chunk, (…, C, C), since its begin, until its end."""
    lost = gate <= RESET  # counted apart: one sum of both would round the decays after it
    decay, resets = gate.masked_fill(lost, 0).cumsum(2), RESET * lost.float().cumsum(2)
    between = (decay - decay.mT + (resets - resets.mT)).tril().exp().tril()
    until = decay[..., -1:, :] - decay + (resets[..., -1:, :] - resets)
    return between, (decay + resets).exp(), until.exp()


def _scan(values: Tensor, erased: Tensor, key: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Go from chunk to chunk; return each one's state before it, and the values it writes."""
    state, states, news = values.new_zeros((len(key), key.shape[-2], values.shape[-1])), [], []
    each = (one.unbind(1) for one in (values, erased, key, left))
    for value, erase, write, keep in zip(*each, strict=True):
        states.append(state)
        news.append(torch.baddbmm(value, erase, state, alpha=-1))
        state = torch.baddbmm(state * keep, write, news[-1])
    return torch.stack(states, 1), torch.stack(news, 1)


class _Inverse(torch.autograd.Function):
    """Invert 1 + the part below the diagonal of (…, C, C), C a power of two.

    Block by block, each from two of half its size: products alone, which a GPU is faster at than at
    solving triangles (docs/performance.md), and as stable, which a sum of powers is not.
    """

    @staticmethod
    def forward(ctx: Any, system: Tensor) -> Tensor:
        size = system.shape[-1]
        inverse = torch.eye(size, dtype=system.dtype, device=system.device).expand_as(system)
        inverse, half = inverse.clone(), 1
        while half < size:
            blocks, below = _blocks(inverse, half), _blocks(system, half)
            first, second = blocks[..., 0, :, 0, :], blocks[..., 1, :, 1, :]
            blocks[..., 1, :, 0, :] = -second @ below[..., 1, :, 0, :] @ first
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        inverse: Tensor = ctx.saved_tensors[0]
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


_invert: Callable[[Tensor], Tensor] = _Inverse.apply


def _blocks(matrix: Tensor, half: int) -> Tensor:
    """View the blocks on the diagonal, (…, blocks, 2, half, 2, half)."""
    count = matrix.shape[-1] // (2 * half)
    split: Tensor = matrix.unflatten(-1, (count, 2, half)).unflatten(-4, (count, 2, half))
    return split.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)


def _chunks(one: Tensor) -> Tensor:
    """Turn (B, T, H, size) into float32 chunks, (B·H, chunks, C, size)."""
    one = one.transpose(1, 2).flatten(0, 1).float()
    chunks: Tensor = pad(one, (0, 0, 0, -one.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    return chunks


def _compute(*tensors: Tensor, unit: bool) -> Tensor:
    rule = kernel[0] if kernel and not tensors[0].is_meta else chunked
    return rule(*tensors, unit=unit).to(tensors[2].dtype).contiguous()


def forward_pass(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor, unit: bool
) -> Tensor:
    """Compute the operator; see `chunked`."""
    return _compute(query, key, value, gate, beta, unit=unit)


def backward_pass(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    beta: Tensor,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator's gradients: its forward pass again, and back through it."""
    with gradients_inside():
        inputs = [one.detach().requires_grad_() for one in (query, key, value, gate, beta)]
        output = _compute(*inputs, unit=unit)
        found = torch.autograd.grad(output, inputs, gradient)
    query, key, value, gate, beta = (one.contiguous() for one in found)
    return query, key, value, gate, beta


_forward = torch.library.custom_op("strixft::gated_delta_rule", forward_pass, mutates_args=())
_backward = torch.library.custom_op(
    "strixft::gated_delta_rule_backward", backward_pass, mutates_args=()
)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(one, memory_format=torch.contiguous_format) for one in inputs[:-1]
    )


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.unit = inputs
    ctx.save_for_backward(*tensors)


def _go_back(context: Any, gradient: Tensor) -> Any:
    return *_backward(gradient, *context.saved_tensors, context.unit), None


_forward.register_autograd(_go_back, setup_context=_keep)

INSIDE: dict[Any, Callable[..., Any]] = {
    torch.ops.strixft.gated_delta_rule.default: forward_pass,
    torch.ops.strixft.gated_delta_rule_backward.default: backward_pass,
}
"""The program of each operator."""


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    beta: Tensor,
    documents: Tensor | None = None,
    *,
    unit: bool = False,
) -> Tensor:
    """Compute the rule without a state before it, (B, T, H, V).

    Arguments are those of `chunked`, but for `documents`: the number of the document of each token,
    (B, T); None where a row is one.
    """
    if documents is not None:
        begins = pad(documents[:, 1:] != documents[:, :-1], (1, 0)).unsqueeze(-1)
        gate = gate.masked_fill(begins, RESET)
    query, key, value = (one.contiguous() for one in (query, key, value))
    output: Tensor = _forward(query, key, value, gate, beta, unit)
    return output


def short_convolution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor
) -> Tensor:
    """Convolve each channel with its last few tokens, of its own document alone, (B, C, T).

    Args:
        hidden: (B, C, T).
        weight: (C, tokens).
        bias: (C,).
        documents: Number of the document of each token, (B, T).
    """
    length, taps = hidden.shape[-1], weight.unbind(-1)
    hidden, documents = hidden.float(), documents.unsqueeze(1)
    total = hidden * taps[-1].unsqueeze(-1)
    for back in range(1, len(taps)):
        earlier = pad(hidden, (back, 0))[..., :length]
        same = pad(documents, (back, 0), value=-1)[..., :length] == documents
        total = total + earlier.masked_fill(~same, 0) * taps[-1 - back].unsqueeze(-1)
    return total if bias is None else total + bias.unsqueeze(-1)
