"""Torch's grouped product of rows and experts, against one product an expert.

Shapes: E experts, S rows of tokens, C channels in, D channels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from strixft.model.experts import grouped_gradient, grouped_product
from strixft.model.kernels import GROUPED, switch_off
from strixft.probe.attention import allowed_error, judged, largest_error, milliseconds
from strixft.support.child import Figures

ROWS = (96, 0, 1, 159)
"""Rows of each expert: one has none, and another a single one."""

SLOWER = 1.5
"""Times one product an expert: with four experts the grouped one has little to gain."""


def _reference(rows: Tensor, weights: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return products, (S, D), and gradients of rows and weights, in float64 on the CPU."""
    rows, weights, gradient = (one.double() for one in (rows, weights, gradient))
    products, of_rows = torch.empty_like(gradient), torch.empty_like(rows)
    of_weights, start = torch.zeros_like(weights), 0
    for expert, count in enumerate(ROWS):
        group = slice(start, start + count)
        products[group] = rows[group] @ weights[expert]
        of_rows[group] = gradient[group] @ weights[expert].T
        of_weights[expert] = rows[group].T @ gradient[group]
        start += count
    return [products, of_rows, of_weights]


def _products(rows: Tensor, weights: Tensor, gradient: Tensor, ends: Tensor) -> list[Tensor]:
    """Return what `_reference` does, by our operators."""
    return [
        grouped_product(rows, weights, ends),
        grouped_product(gradient, weights.mT, ends),
        grouped_gradient(rows, gradient, ends),
    ]


def measure_grouped(device: str, dtype: str, sides: Sequence[Sequence[int]]) -> Figures:
    """Measure error and time of the grouped product in a model's sizes.

    Args:
        device: `cuda` or `cpu`.
        dtype: Such as `bfloat16`.
        sides: C and D of the model's experts.

    Returns:
        `error`, `grouped_ms` and `single_ms` of all sides; and a `problem` if it is wrong, or
        slower than one product an expert.
    """
    kind, draw = getattr(torch, dtype), torch.Generator().manual_seed(0)
    ends = torch.tensor(ROWS, device=device).cumsum(0).int()
    errors, times = [], {"grouped_ms": 0.0, "single_ms": 0.0}
    for inside, outside in sides:
        shapes = (sum(ROWS), inside), (len(ROWS), inside, outside), (sum(ROWS), outside)
        drawn = [torch.randn(shape, generator=draw).to(kind) for shape in shapes]
        rows, weights, gradient = (one.to(device) for one in drawn)
        work = partial(_products, rows, weights, gradient, ends)
        switch_off(())
        errors.append(largest_error(work(), _reference(*drawn)))
        times["grouped_ms"] += milliseconds(work, device)
        switch_off((GROUPED,))
        times["single_ms"] += milliseconds(work, device)
        switch_off(())
    longest = max(max(map(max, sides)), *ROWS)
    figures = judged(max(errors), allowed_error(kind, longest)) | times
    if "problem" not in figures and times["grouped_ms"] > SLOWER * times["single_ms"]:
        figures["problem"] = (
            f"{times['grouped_ms']:.2f} ms, one product an expert {times['single_ms']:.2f} ms"
        )
    return figures
