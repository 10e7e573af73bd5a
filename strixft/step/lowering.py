"""Layers as code that inductor generates; imported when the first layer is compiled.

A pass over the graphs that inductor writes, and code of our own for an operator, have no public
interface (torch 2.13). This file ends where they get one.

Shapes: a 4-bit weight is (N, K), packed in N·K / 2 bytes, with a scale for each block of so many
values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import fallback_handler, register_lowering, view
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from strixft.step.matrix_products import rewrite


class _Pass(CustomGraphPass):
    """Rewrites the graphs of forward and of backward before their kernels are written."""

    def __call__(self, graph: fx.Graph) -> None:
        rewrite(graph)

    def uuid(self) -> bytes:
        """Tell the compiler's cache of another version of this folder."""
        return get_hash_for_files(tuple(sorted(map(str, Path(__file__).parent.glob("*.py")))))


def compile_graph(module: fx.GraphModule, inputs: Any) -> Any:
    """Compile a layer's graph with inductor, and with our pass over its products."""
    if "bitsandbytes" in sys.modules:
        _generate_4bit()
    patches = {"post_grad_custom_post_pass": _Pass(), "reorder_for_peak_memory": False}
    return compile_fx(module, inputs, config_patches=patches)


torch.library.define("strixft::add_product", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")


@torch.library.impl("strixft::add_product", "CompositeExplicitAutograd")
def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left (T, K) times right (K, N) to a total (T, N), in place."""
    total.addmm_(left, right)


@register_lowering(torch.ops.aten.addmm_.default, type_promotion_kind=None)
def _add_in_place(total: Any, *others: Any) -> Any:
    """Write a product over its first argument.

    The operator called returns nothing: a result would keep the matrix while the code runs, and the
    compiler's own code would copy the matrix first.
    """
    ir.FallbackKernel.create(torch.ops.strixft.add_product.default, total, *others)
    return total


@cache
def _generate_4bit() -> None:
    """Let a generated kernel write 4-bit weights out, (N, K).

    bitsandbytes does so at half of an H200's bandwidth (docs/performance.md).
    """
    from bitsandbytes.backends.utils import CODE

    unpack = torch.ops.bitsandbytes.dequantize_4bit.default

    @register_lowering(unpack, type_promotion_kind=None)
    def _(
        packed: Any, scales: Any, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Any:
        # bitsandbytes has other values for FP4 on each device, and may store bytes as other types
        if kind != "nf4" or packed.get_dtype() != torch.uint8:
            return fallback_handler(unpack, add_to_fallback_set=False)(
                packed, scales, block, kind, shape, dtype
            )
        device = packed.get_device()
        table = V.graph.add_tensor_constant(_on_device(CODE["nf4"], device), "nf4")
        value = _value_at(view(packed, [-1]).make_loader(), scales.make_loader(), block, table)

        def at(index: Sequence[Any]) -> Any:
            return ops.to_dtype(value(index[0] * shape[1] + index[1]), dtype)

        return ir.Pointwise.create(device=device, dtype=dtype, inner_fn=at, ranges=list(shape))


def _value_at(load_pair: Any, load_scale: Any, block: int, table: Any) -> Callable[[Any], Any]:
    """Return a weight's value by its place: a byte holds two, the first in its upper half."""
    load_code = table.make_loader()

    def value(place: Any) -> Any:
        pair = ops.to_dtype(load_pair([FloorDiv(place, 2)]), torch.int32)
        shift = ops.index_expr(4 - 4 * ModularIndexing(place, 1, 2), torch.int32)
        shifted = ops.bitwise_right_shift(pair, shift)
        code = ops.bitwise_and(shifted, ops.constant(15, torch.int32))
        entry = ops.indirect_indexing(code, 16, check=False, wrap_neg=False)
        return ops.mul(load_code([entry]), load_scale([FloorDiv(place, block)]))

    return value


@cache
def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sixteen values of NF4, (16,), the same tensor each time."""
    return table.to(device)
