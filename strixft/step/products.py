"""How compiled layers multiply: a pass over the graph of a layer, forward or backward.

What is computed stays the same up to rounding; less of it moves through memory.

- Thin products of one matrix, as by LoRA's A in q, k and v, become one: the matrix is read once.
- A sum of products becomes one product of joined matrices (`strixft.step.joined`). Where that would
  copy too much it is added up by the products themselves, the thin ones first, so that no kernel
  reads all of them once more; a large product hides most of what it reads.
- 4-bit weights are written out by a kernel of their own (`strixft.step.unpack`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch._inductor.pattern_matcher import stable_topological_sort

from strixft.step.graphs import (
    Joins,
    call,
    calls,
    depends,
    is_generated,
    is_view,
    replace,
    value_of,
)
from strixft.step.joined import join_sums
from strixft.step.sums import THIN, Sum, find_sums, left_of, right_of

aten = torch.ops.aten

ADD_PRODUCT = aten.addmm_.default
"""Adds a product to a matrix, in place."""


# Thin products


def _thin_products(graph: fx.Graph, shared: int) -> Iterator[list[fx.Node]]:
    """Products that share their left (0) or right (1) matrix, and whose other one is thin."""
    groups = defaultdict(list)
    for node in calls(graph, aten.mm.default):
        if value_of(node).shape[1 - shared] <= THIN:
            groups[node.args[shared]].append(node)
    yield from (group for group in groups.values() if len(group) > 1)


def _join_thin_products(graph: fx.Graph, joins: Joins) -> None:
    for shared in (0, 1):
        for group in _thin_products(graph, shared):
            others = [cast("fx.Node", node.args[1 - shared]) for node in group]
            if not depends(others, {*group}):
                _join_products(group, others, shared, joins)
                stable_topological_sort(graph)


def _join_products(group: list[fx.Node], others: list[fx.Node], shared: int, joins: Joins) -> None:
    graph, dim = group[0].graph, 1 - shared
    ends = list(accumulate(value_of(node).shape[dim] for node in group))
    with graph.inserting_before(group[0]):
        operands = [cast("fx.Node", group[0].args[shared]), joins(others, dim)]
        joined = call(graph, aten.mm.default, *(operands if shared == 0 else operands[::-1]))
        pieces = [
            call(graph, aten.slice.Tensor, joined, dim, start, end)
            for start, end in pairwise([0, *ends])
        ]
    for node, piece in zip(group, pieces, strict=True):
        replace(node, piece)


# Sums


def _add_up(found: Sum, joins: Joins) -> None:
    """Let the products of a sum be added up in place."""
    found.replace(_total(found, joins))


def _total(found: Sum, joins: Joins) -> fx.Node:
    """Sum of products: the thin ones as one, the others added to it."""
    graph, large = found.root.graph, list(found.large)
    first = found.thin or [large.pop(0)]
    with graph.inserting_before(first[0]):
        left, right = list(map(left_of, first)), list(map(right_of, first))
        total = call(graph, aten.mm.default, joins(left, 1), joins(right, 0))
    for node in large:
        with graph.inserting_before(node):
            total = call(graph, ADD_PRODUCT, total, *node.args)
    return total


torch.library.define("strixft::add_product", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")


@torch.library.impl("strixft::add_product", "CompositeExplicitAutograd")
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right)


@register_lowering(ADD_PRODUCT, type_promotion_kind=None)
def _generate(total: Any, left: Any, right: Any) -> Any:
    """What the compiler generates for it: the compiler's own way would copy the matrix first.

    By an operator that returns nothing: a result would keep the matrix while the code runs.
    """
    ir.FallbackKernel.create(torch.ops.strixft.add_product.default, total, left, right)
    return total


# Order in memory


def _write_in_order(graph: fx.Graph) -> None:
    """Let a kernel write as it is read what an operator reads through a view.

    The compiler lets a kernel write in the order of its sides, whatever strides they have here, and
    then copies, as for queries and keys between their rotation and attention.
    """
    for node in graph.nodes:
        is_read = any(not is_generated(u) and not is_view(u) for u in node.users)
        if is_view(node) and is_read and _is_reordered(node):
            with graph.inserting_after(node):
                own = call(graph, aten.clone.default, node)
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _is_reordered(view: fx.Node) -> bool:
    source = view
    while is_view(source):
        source = source.all_input_nodes[0]
    return (
        is_generated(source)
        and isinstance(value_of(view), Tensor)  # a split gives several
        and isinstance(value_of(source), Tensor)
        and value_of(view).is_contiguous()
        and not value_of(source).is_contiguous()
    )


# The pass


def rewrite(graph: fx.Graph, *, joined: bool = True) -> None:
    """Rewrite the products of a layer's graph.

    Args:
        graph: Of forward or of backward.
        joined: See `Ways.joined`.
    """
    joins = Joins()
    if "bitsandbytes" in sys.modules:
        from strixft.step import nf4_kernel

        nf4_kernel.split_products(graph)
    _write_in_order(graph)
    _join_thin_products(graph, joins)
    sums = find_sums(graph)
    for found in join_sums(graph, sums, joins) if joined else sums:
        _add_up(found, joins)
    stable_topological_sort(graph)
    if "bitsandbytes" in sys.modules:
        nf4_kernel.unpack_late(graph)


class Products(CustomGraphPass):
    """The pass as the compiler takes it.

    Args:
        joined: See `Ways.joined`.
    """

    def __init__(self, *, joined: bool) -> None:
        self._joined = joined

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph."""
        rewrite(graph, joined=self._joined)

    def uuid(self) -> bytes:
        """Tells the compiler's cache of another version."""
        files = sorted(map(str, Path(__file__).parent.glob("*.py")))
        return get_hash_for_files(tuple(files), f"{self._joined}")
