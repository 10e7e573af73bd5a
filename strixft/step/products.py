"""How compiled layers multiply: a pass over the graph of a layer, forward or backward.

What is computed stays the same up to rounding; less of it moves through memory.

- Thin products of one matrix, as by LoRA's A in q, k and v, become one: the matrix is read once.
- A sum of products is added up by the products themselves, the thin ones first, so that no kernel
  reads all of them once more; a large product hides most of what it reads.
- 4-bit weights are written out by a kernel of their own (`strixft.step.unpack`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch._inductor.pattern_matcher import stable_topological_sort

from strixft.step import graphs
from strixft.step.graphs import call, calls, replace, value_of

aten = torch.ops.aten
ADD_PRODUCT = aten.addmm_.default
"""Adds a product to a matrix, in place."""
THIN = 64
"""Rank up to which a product takes the time that its large operand takes to be read or written."""
_SEEN_THROUGH = {aten.view.default, aten.reshape.default, aten.clone.default}
"""What a product may pass on its way into a sum."""


# Thin products


def _depends(nodes: Iterable[fx.Node], on: set[fx.Node]) -> bool:
    """Whether any of the nodes is computed from one of others, in a graph that is sorted."""
    first, seen, look_at = min(on), set[fx.Node](), list(nodes)
    while look_at:
        node = look_at.pop()
        if node in on:
            return True
        seen.add(node)
        look_at += [n for n in node.all_input_nodes if n >= first and n not in seen]
    return False


class _Joins:
    """Puts matrices together; those that were put together once are used again."""

    def __init__(self) -> None:
        self._joined: dict[tuple[int, tuple[fx.Node, ...]], fx.Node] = {}

    def __call__(self, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
        """Matrices behind each other along a dimension, where the graph inserts now."""
        key = dim, tuple(nodes)
        if len(nodes) > 1 and key not in self._joined:
            self._joined[key] = self._join(nodes, dim)
        return self._joined.get(key, nodes[0])

    def _join(self, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
        graph = nodes[0].graph
        if all(node.target is aten.permute.default for node in nodes):
            untransposed = [node.all_input_nodes[0] for node in nodes]
            return call(graph, aten.permute.default, self(untransposed, 1 - dim), [1, 0])
        return call(graph, aten.cat.default, list(nodes), dim)


def _thin_products(graph: fx.Graph, shared: int) -> Iterator[list[fx.Node]]:
    """Products that share their left (0) or right (1) matrix, and whose other one is thin."""
    groups = defaultdict(list)
    for node in calls(graph, aten.mm.default):
        if value_of(node).shape[1 - shared] <= THIN:
            groups[node.args[shared]].append(node)
    yield from (group for group in groups.values() if len(group) > 1)


def _join_thin_products(graph: fx.Graph, joins: _Joins) -> None:
    for shared in (0, 1):
        for group in _thin_products(graph, shared):
            others = [cast("fx.Node", node.args[1 - shared]) for node in group]
            if not _depends(others, {*group}):
                _join_products(group, others, shared, joins)
                stable_topological_sort(graph)


def _join_products(group: list[fx.Node], others: list[fx.Node], shared: int, joins: _Joins) -> None:
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


def _source(node: fx.Node) -> fx.Node:
    """What a view or copy shows, if nobody else sees it."""
    while node.target in _SEEN_THROUGH and len(node.users) == 1:
        node = node.all_input_nodes[0]
    return node


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    values = [value_of(arg) for arg in node.args if isinstance(arg, fx.Node)]
    return len(values) == 2 and all(value.dtype == value_of(node).dtype for value in values)


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """What is added up in a sum."""
    for term in cast("tuple[fx.Node, fx.Node]", node.args):
        if _is_sum(term) and len(term.users) == 1 and value_of(term).shape == value_of(node).shape:
            yield from _terms(term)
        else:
            yield term


def _product_in(term: fx.Node, root: fx.Node) -> fx.Node | None:
    """The product that a term of a sum is."""
    source = _source(term)
    shapes = {(value_of(n).shape[-1:], value_of(n).numel()) for n in (term, source, root)}
    is_whole = len(shapes) == 1 and value_of(term).shape == value_of(root).shape
    is_own = source.target is aten.mm.default and len(source.users) == 1
    return source if is_whole and is_own else None


def _add_up(root: fx.Node, joins: _Joins) -> None:
    """Let the products of a sum be added up in place."""
    terms = list(_terms(root))
    found = {term: _product_in(term, root) for term in terms}
    products = sorted(filter(None, found.values()))
    if len(products) < 2 or len(found) < len(terms):  # a term that is added twice
        return
    graph, total = root.graph, _total(products, joins)
    with graph.inserting_before(root):
        result = call(graph, aten.view.default, total, list(value_of(root).shape))
        for term in terms:
            if found[term] is None:
                result = call(graph, aten.add.Tensor, term, result)
    replace(root, result)


def _total(products: list[fx.Node], joins: _Joins) -> fx.Node:
    """Sum of products: the thin ones as one, the others added to it."""
    graph = products[0].graph
    ranks = {node: value_of(cast("fx.Node", node.args[0])).shape[1] for node in products}
    thin = [node for node in products if ranks[node] <= THIN]
    large = [node for node in products if ranks[node] > THIN]
    first = thin or [large.pop(0)]
    with graph.inserting_before(first[0]):
        left, right = ([cast("fx.Node", node.args[side]) for node in first] for side in (0, 1))
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


# The pass


def rewrite(graph: fx.Graph) -> None:
    """Rewrite the products of a layer's graph."""
    joins = _Joins()
    if "bitsandbytes" in sys.modules:
        from strixft.step import unpack

        unpack.split_products(graph)
    _join_thin_products(graph, joins)
    for node in reversed(calls(graph, aten.add.Tensor)):
        if node.users and _is_sum(node):
            _add_up(node, joins)
    stable_topological_sort(graph)
    if "bitsandbytes" in sys.modules:
        unpack.unpack_late(graph)


class Products(CustomGraphPass):
    """The pass as the compiler takes it."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph."""
        rewrite(graph)

    def uuid(self) -> bytes:
        """Tells the compiler's cache of another version."""
        files = (__file__, graphs.__file__, str(Path(__file__).with_name("unpack.py")))
        return get_hash_for_files(files)
