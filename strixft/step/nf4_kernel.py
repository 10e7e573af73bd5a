"""4-bit weights in compiled layers: written out by a generated kernel, then multiplied.

bitsandbytes does so inside its product, at half of an H200's bandwidth (docs/performance.md).

Shapes: a weight is (N, K), packed in N·K / 2 bytes, with a scale for each block of so many values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import bitsandbytes  # noqa: F401  # defines its operators
import torch
from bitsandbytes.backends.utils import CODE
from torch import fx

from strixft.step.compiler import (
    FloorDiv,
    ModularIndexing,
    V,
    fallback_handler,
    ir,
    ops,
    register_lowering,
    view,
)
from strixft.step.graphs import call, calls, replace, value_of

aten, bnb = torch.ops.aten, torch.ops.bitsandbytes

UNPACK = bnb.dequantize_4bit.default

MOST_FUSED_ROWS = 1536
"""Tokens up to which bitsandbytes may multiply without writing the weights out (0.50)."""


def split_products(graph: fx.Graph) -> None:
    """Let the weights be written out, and be multiplied by an ordinary product."""
    for node in calls(graph, bnb.gemm_4bit.default):
        tokens = value_of(node).numel() // value_of(node).shape[-1]
        has_bias = len(node.args) > 6 and node.args[6] is not None
        if tokens > MOST_FUSED_ROWS and not has_bias:
            _split(node)


def _split(node: fx.Node) -> None:
    x, packed, shape, scales, block, kind, _, small, codes, offset = (*node.args, *[None] * 4)[:10]
    graph, source = node.graph, cast("fx.Node", x)
    with graph.inserting_before(node):
        if small is not None:  # the scales are quantised too
            nested = (small, scales, codes, 256, torch.float32)
            large = call(graph, bnb.dequantize_blockwise.default, *nested)
            scales = call(graph, aten.add.Tensor, large, offset)
        stored = (packed, scales, block, kind, shape, value_of(source).dtype)
        weight = call(graph, UNPACK, *stored)  # (N, K)
        columns = call(graph, aten.permute.default, weight, [1, 0])
        rows = call(graph, aten.view.default, source, [-1, value_of(weight).shape[1]])  # (T, K)
        product = call(graph, aten.mm.default, rows, columns)  # (T, N)
        result = call(graph, aten.view.default, product, list(value_of(node).shape))
    replace(node, result)


def unpack_late(graph: fx.Graph) -> None:
    """Write weights out right before they are multiplied: one at a time is in memory."""
    for weight in calls(graph, UNPACK):
        path = [weight]  # the weight, perhaps its transpose, the product
        while len(path[-1].users) == 1 and path[-1].target in (UNPACK, aten.permute.default):
            path += path[-1].users
        if len(path) > 1:
            _bring(path[-2], path[-1])


def _bring(node: fx.Node, place: fx.Node) -> None:
    """Move a call, and what only it needs, right before another one."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and len(source.users) == 1:
            _bring(source, place)
    place.prepend(node)


# Generated code


@register_lowering(UNPACK, type_promotion_kind=None)
def _generate(
    packed: Any, scales: Any, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Any:
    """Generate the kernel that writes weights out, (N, K)."""
    # bitsandbytes has other values for FP4 on each device, and may store bytes as other types
    if kind != "nf4" or packed.get_dtype() != torch.uint8:
        return fallback_handler(UNPACK, add_to_fallback_set=False)(
            packed, scales, block, kind, shape, dtype
        )
    device = packed.get_device()
    table = V.graph.add_tensor_constant(_table(device), "nf4")
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
def _table(device: torch.device) -> torch.Tensor:
    """Return the sixteen values of NF4, (16,)."""
    values: torch.Tensor = CODE["nf4"].to(device)
    return values
