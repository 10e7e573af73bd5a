"""Experts that a router chooses, each token's together: grouped products, and adapters on them.

transformers lets a mixture's fused experts be computed by a function that is registered. This one
sorts the tokens by expert and multiplies each group by its expert's matrix. An adapter of all
experts is two thin grouped products; the sum W + BA is never written out.

Shapes: N tokens, K experts of a token, S = N K rows, E experts, C channels in, D channels out,
R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from strixft.model import expert_counts, kernels
from strixft.support.private_hf import apply_gate

NAME = "strixft"
"""Name of `routed_experts` for transformers."""

ALIGNED = 8
"""Sides of matrices in bf16 that torch's grouped product takes: multiples of 16 bytes."""

Factors = tuple[Tensor, Tensor]
"""A of all experts, (E, C, R), times the adapter's scaling; and B, (E, R, D)."""


def is_grouped(*factors: Tensor) -> bool:
    """Return whether torch's own grouped product is taken; else there is a product an expert."""
    return kernels.is_on(kernels.GROUPED) and all(
        one.is_cuda and one.dtype is torch.bfloat16 and one.shape[-1] % ALIGNED == 0
        for one in factors
    )


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


@torch.library.custom_op("strixft::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return each row (S, C) times its expert's matrix, of (E, C, D): (S, D).

    Args:
        rows: Sorted by expert.
        weights: Of any strides; in the type of the rows, or cast to it expert by expert.
        ends: Row behind the last one of each expert, (E,), int32.
    """
    if is_grouped(rows, weights):
        return grouped_mm(rows, weights, offs=ends)
    found = rows.new_empty(len(rows), weights.shape[-1])
    for expert, group in _groups(ends):
        torch.mm(rows[group], weights[expert].to(rows.dtype), out=found[group])
    return found


@torch.library.custom_op("strixft::grouped_gradient", mutates_args=())
def grouped_gradient(rows: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient (E, C, D) of experts' matrices, of rows (S, C) and products (S, D).

    That of an expert without rows is zero.
    """
    if is_grouped(rows, gradient):
        found = grouped_mm(rows.T, gradient, offs=ends)
        is_idle = ends.diff(prepend=ends.new_zeros(1)) == 0
        return found.masked_fill_(is_idle[:, None, None], 0)
    found = rows.new_zeros(len(ends), rows.shape[-1], gradient.shape[-1])
    for expert, group in _groups(ends):
        torch.mm(rows[group].T, gradient[group], out=found[expert])
    return found


@grouped_product.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weights.shape[-1])


@grouped_gradient.register_fake
def _(rows: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(ends), rows.shape[-1], gradient.shape[-1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    rows, weights, ends = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, ends)


def _go_back(ctx: Any, gradient: Tensor) -> Any:
    rows, weights, ends = ctx.saved_tensors
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = grouped_product(gradient, weights.mT, ends)
    if ctx.needs_input_grad[1]:
        of_weights = grouped_gradient(rows, gradient, ends)
    return of_rows, of_weights, None


grouped_product.register_autograd(_go_back, setup_context=_keep)


@register_flop_formula([torch.ops.strixft.grouped_product, torch.ops.strixft.grouped_gradient])
def _flop(left: Any, right: Any, *_: Any, **__: Any) -> int:  # shapes
    return int(2 * left[0] * left[1] * right[-1])


class _Reorder(torch.autograd.Function):
    """Puts rows into another order; the gradient is put back, and no two rows are added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        order, back = ctx.saved_tensors
        return _reordered(gradients[0], back, order), None, None


def _reordered(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    found: Tensor = _Reorder.apply(rows, order, back)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, slots=True)
class _Routes:
    """Rows of tokens sorted by their experts, as one module multiplies them."""

    experts: Any
    ends: Tensor
    """Row behind the last one of each expert, (E,), int32."""
    order: Tensor
    """Place among the tokens' choices, of each row, (S,)."""
    back: Tensor
    """Row of each choice, (S,)."""
    adapters: Mapping[str, Factors]

    @classmethod
    def of(cls, experts: Any, index: Tensor, adapters: Mapping[str, Factors]) -> _Routes:
        """Sort choices, (N, K)."""
        chosen, order = index.flatten().sort(stable=True)
        back = torch.empty_like(order)
        back.scatter_(0, order, torch.arange(len(order), device=order.device))
        each = torch.arange(experts.num_experts, device=index.device)
        ends = torch.searchsorted(chosen, each, right=True, out_int32=True)
        return cls(experts, ends, order, back, adapters)

    def sorted(self, choices: Tensor) -> Tensor:
        """Return what belongs to each row, (S, …)."""
        return _reordered(choices, self.order, self.back)

    def unsorted(self, rows: Tensor) -> Tensor:
        """Return what belongs to each choice, (S, …)."""
        return _reordered(rows, self.back, self.order)

    def product(self, name: str, rows: Tensor) -> Tensor:
        """Return rows, (S, C), times the experts' matrices of a name and their adapter, (S, D)."""
        weights: Any = getattr(self.experts, name)
        is_transposed = self.experts.is_transposed
        found: Tensor
        if not isinstance(weights, Tensor):  # `PackedExperts`
            found = weights.product(rows, self.ends, transposed=not is_transposed)
        else:  # (E, C, D)
            found = grouped_product(rows, weights if is_transposed else weights.mT, self.ends)
        if name in self.adapters:
            a, b = self.adapters[name]
            found = found + grouped_product(grouped_product(rows, a, self.ends), b, self.ends)
        return found

    def bias(self, name: str) -> Tensor | float:
        """Return the bias of each row, (S, D); zero if there is none."""
        if not self.experts.has_bias:
            return 0.0
        places = torch.arange(len(self.order), device=self.ends.device, dtype=torch.int32)
        of_row = torch.searchsorted(self.ends, places, right=True)
        found: Tensor = getattr(self.experts, f"{name}_bias")[of_row]
        return found


def routed_experts(
    experts: Any,
    hidden: Tensor,
    index: Tensor,
    shares: Tensor,
    adapters: Mapping[str, Factors] | None = None,
) -> Tensor:
    """Return the weighted sum of each token's experts, (N, C).

    The shares are multiplied before the last product, so that its result need not be kept.

    Args:
        experts: A module of transformers that `use_experts_implementation` decorates.
        hidden: (N, C).
        index: Experts of each token, (N, K).
        shares: Their weights, (N, K).
        adapters: Factors by the names of the parameters to which they belong.
    """
    if expert_counts.watch is not None:
        expert_counts.watch.note(experts, index)
    routes, (tokens, chosen) = _Routes.of(experts, index, adapters or {}), index.shape
    rows = routes.sorted(hidden.unsqueeze(1).expand(-1, chosen, -1).flatten(0, 1))
    first, last = parameters_of(experts)
    inner = routes.product(first, rows) + routes.bias(first)
    inner = apply_gate(experts, inner) if experts.has_gate else experts.act_fn(inner)
    share = routes.sorted(shares.flatten()).unsqueeze(-1)
    if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 has none
        outer = routes.product(last, inner) + routes.bias(last)
        outer = experts.post_expert_norm(outer) * share
    else:
        outer = routes.product(last, (inner * share).to(inner.dtype)) + routes.bias(last) * share
    found = routes.unsorted(outer).view(tokens, chosen, -1).sum(1)
    return found.to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, routed_experts)


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules that `routed_experts` computes, by their names without adapters."""
    return {
        path.replace(".base_layer", ""): part
        for path, part in model.named_modules()
        if hasattr(part, "is_concatenated")
    }


def matrices_of(model: nn.Module) -> dict[str, Any]:
    """Return the matrices of a model's fused experts, (E, …), by the names of their parameters."""
    return {
        f"{path}.{name}": getattr(experts, name)
        for path, experts in fused_experts(model).items()
        for name in parameters_of(experts)
    }


def sides_of(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return channels in and out, C and D, of the different matrices of a model's experts."""
    found = set()
    for experts in fused_experts(model).values():
        for name in parameters_of(experts):
            rows, columns = getattr(experts, name).shape[1:]
            found.add((rows, columns) if experts.is_transposed else (columns, rows))
    return tuple(sorted(found))


def call_routed(model: Any) -> None:
    """Let a transformers model compute its fused experts by `routed_experts`."""
    if fused_experts(model):
        model.set_experts_implementation(NAME)


def parameters_of(experts: Any) -> list[str]:
    """Return the names of the matrices of an experts module."""
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
