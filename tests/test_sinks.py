"""Learned sinks in flash attention, whose kernels a CPU lacks: by their definition here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss

from strixft.attention.core import attend, attend_eagerly, varlen

HEADS, KEY_HEADS, SIZE, LENGTHS = 4, 2, 8, (5, 7)


def scores_of(query: Tensor, key: Tensor, ends: Tensor, scale: float, window: int | None) -> Tensor:
    """Scores of all tokens, (H, N, N); -∞ where a token is not seen."""
    places = torch.arange(len(query))
    of = torch.bucketize(places, ends[1:], right=True)
    seen = (of[:, None] == of[None]).tril()
    if window is not None:
        seen = seen.triu(-window)
    key = key.repeat_interleave(HEADS // KEY_HEADS, 1)
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    return scores.masked_fill(~seen, float("-inf"))


def forward(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *rest: Any, **more: Any
) -> Any:
    """What flash attention returns."""
    scores = scores_of(query, key, ends, more["scale"], more.get("window_size_left"))
    wide = value.repeat_interleave(HEADS // KEY_HEADS, 1)
    output = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), wide)
    state = torch.zeros(2, dtype=torch.int64), torch.zeros(()), torch.zeros(0)
    return output, scores.logsumexp(-1), *state


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor,
    ends: Tensor, *rest: Any, **more: Any,
) -> Any:  # fmt: skip
    """The algorithm of arXiv:2307.08691 (section 3.1.2), which trusts the sums that it is given."""
    scores = scores_of(query, key, ends, more["scale"], more.get("window_size_left"))
    groups = HEADS // KEY_HEADS
    shares = (scores - sums.unsqueeze(-1)).exp()  # (H, N, N)
    of_shares = torch.einsum("nhd,mhd->hnm", gradient, value.repeat_interleave(groups, 1))
    delta = (gradient * output).sum(-1).T.unsqueeze(-1)
    of_scores = shares * (of_shares - delta) * more["scale"]

    def by_key(wide: Tensor) -> Tensor:  # (N, H, D): heads of queries that share keys added up
        found: Tensor = wide.unflatten(1, (KEY_HEADS, groups)).sum(2)
        return found

    of_query = torch.einsum("hnm,mhd->nhd", of_scores, key.repeat_interleave(groups, 1))
    of_key = by_key(torch.einsum("hnm,nhd->mhd", of_scores, query))
    of_value = by_key(torch.einsum("hnm,nhd->mhd", shares, gradient))
    return of_query, of_key, of_value


@pytest.fixture
def flash() -> Iterator[None]:
    """Flash attention on a CPU, written out."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    query, key, value = (
        torch.randn(1, count, sum(LENGTHS), SIZE, requires_grad=True) for count in heads
    )
    return query, key, value, torch.randn(HEADS, requires_grad=True)


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_with_sinks_is_the_softmax_with_one_more_score(
    flash: None, window: int | None
) -> None:
    query, key, value, sinks = inputs()
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    of = torch.bucketize(torch.arange(sum(LENGTHS)), ends[1:], right=True)
    seen = (of[:, None] == of[None]).tril()
    seen = seen if window is None else seen.triu(1 - window)
    due, _ = attend_eagerly(torch.nn.Identity(), query, key, value, seen[None, None], s_aux=sinks)
    found = varlen(query, key, value, ends, max(LENGTHS), SIZE**-0.5, window, sinks)
    torch.testing.assert_close(found, due)
    gradient = torch.randn(due.shape)
    tensors = query, key, value, sinks
    gradients = torch.autograd.grad(found, tensors, gradient)
    for one, right in zip(gradients, torch.autograd.grad(due, tensors, gradient), strict=True):
        torch.testing.assert_close(one, right)


@pytest.mark.parametrize("cached", [0, 4])
def test_text_is_written_on_with_sinks(cached: int) -> None:
    """Beside transformers' own function; with a cache there are fewer queries than keys."""
    query, key, value, sinks = inputs()
    layer: Any = torch.nn.Identity()
    layer.num_key_value_groups, layer.sinks = HEADS // KEY_HEADS, sinks
    length, query = key.shape[2], query[:, :, cached:]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[cached:]
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    due = modeling_gpt_oss.eager_attention_forward(
        layer.eval(), query, key, value, bias, SIZE**-0.5
    )[0]
    for mask in (None, seen[None, None]):
        torch.testing.assert_close(attend(layer, query, key, value, mask, s_aux=sinks)[0], due)
