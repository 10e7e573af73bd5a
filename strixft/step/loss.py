"""Cross-entropy of a linear head without the logits of all tokens.

The logits of one chunk are made, turned into their own gradient in place, and multiplied back to
the hidden states, all in the forward pass. So nothing of size tokens × vocabulary is kept, and the
head costs one product forward and one for the gradient, as it would with full logits.

Shapes: K trained tokens, n of them in a chunk; C hidden sizes, V words of the vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strixft.step.compiler import maybe_mark_dynamic

CHUNK_ELEMENTS = 2**27
"""Logits in one chunk: 512 MiB in float32."""


def chunk_rows(num_rows: int, vocabulary: int) -> int:
    """Return the rows of a chunk: at most `CHUNK_ELEMENTS` logits, in equal chunks."""
    most = max(1, CHUNK_ELEMENTS // vocabulary)
    chunks = -(-num_rows // most)
    return -(-num_rows // chunks) if chunks else 1


def rows_of_whole_chunks(most_rows: int, vocabulary: int) -> int:
    """Return the most rows up to a number that fill their chunks: no number has larger ones."""
    whole = max(1, CHUNK_ELEMENTS // vocabulary)
    return most_rows - most_rows % whole if most_rows > whole else most_rows


def _losses_and_gradient_(
    logits: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return losses (n, 1) of raw logits (n, V), and their sum's gradient (n, V) over the logits.

    Everything happens in place: torch's own `logsumexp` would copy the logits.
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(softcap)
    logits.sub_(logits.amax(-1, keepdim=True))
    picked = logits.gather(-1, labels.unsqueeze(-1))
    sums = logits.exp_().sum(-1, keepdim=True)
    losses = sums.log() - picked
    probabilities = logits.div_(sums)
    probabilities.scatter_add_(-1, labels.unsqueeze(-1), torch.full_like(picked, -1))
    return losses, probabilities if slope is None else probabilities.mul_(slope)


def _in_one_pass(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return what `logits_gradient` does; one kernel reads the logits and writes the gradient."""
    scores = logits.float()
    capped = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    top = capped.amax(-1, keepdim=True)
    weights = (capped - top).exp()
    sums = weights.sum(-1, keepdim=True)
    picked = capped.gather(-1, labels.unsqueeze(-1))
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    gradient = weights / sums - is_label.float()
    slope = 1.0 if softcap is None else 1 - (capped / softcap).square()
    return (sums.log() + top - picked).sum(), (gradient * slope).to(logits.dtype)


@cache
def _compiled() -> Any:  # decorating would import inductor, which takes a second
    # a row is read once for its largest and its sum
    return torch.compile(_in_one_pass, options={"split_reductions": False})


@torch.library.custom_op("strixft::logits_gradient", mutates_args=())
def logits_gradient(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return the sum () of the losses of raw logits (n, V), and its gradient (n, V) in their dtype.

    An operator of its own, so that a plan sees what it returns and nothing of what it fuses.
    """
    for rows in (logits, labels):  # their number differs, the vocabulary does not
        maybe_mark_dynamic(rows, 0)
    return cast("tuple[Tensor, Tensor]", _compiled()(logits, labels, softcap))


@logits_gradient.register_fake
def _(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the raw logits of a chunk, (n, V)."""
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def _gradient_of_chunk(
    hidden: Tensor,
    head: tuple[Tensor, Tensor | None],
    labels: Tensor,
    softcap: float | None,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sum () of the losses, and the gradient of the logits (n, V) in hidden's dtype."""
    logits = _logits(hidden, *head)
    if compiled:
        return cast("tuple[Tensor, Tensor]", logits_gradient(logits, labels, softcap))
    logits = logits.float()
    losses, gradient = _losses_and_gradient_(logits, labels, softcap)
    return losses.sum(), gradient.to(hidden.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        compiled: bool,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None  # (K, C)
        grad_weight = torch.zeros_like(weight) if need_weight else None  # (V, C)
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        )  # (V,)
        rows = chunk_rows(len(labels), len(weight))
        for start in range(0, len(labels), rows):
            chunk = slice(start, start + rows)
            loss, gradient = _gradient_of_chunk(
                hidden[chunk], (weight, bias), labels[chunk], softcap, compiled
            )
            total += loss
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(gradient.T, hidden[chunk])
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            del gradient  # or the next chunk's logits are made beside it
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = (g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return *found, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    *,
    bias: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Return the sum of the losses of tokens, (), in float32.

    Args:
        hidden: Hidden states that predict them, (K, C).
        weight: The head's matrix, (V, C).
        labels: The tokens, (K,).
        softcap: Logits are softcap × tanh(logits / softcap), as Gemma 2 does.
        bias: The head's bias, (V,).
        compiled: Turn logits into their gradient in one generated kernel.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, softcap, compiled
    )
    return loss


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the loss of each token, (K,), in float32; arguments as `chunked_cross_entropy`."""
    rows = chunk_rows(len(labels), len(weight)) or 1
    chunks = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat(
        [
            _losses_and_gradient_(_logits(h, weight, bias).float(), n, softcap)[0].view(-1)
            for h, n in chunks
        ]
    )
