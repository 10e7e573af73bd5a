"""Products of compiled layers: a pass over the graph of a layer, forward or backward.

What is computed stays the same up to rounding; less of it moves through memory.

- Thin products of one matrix, as by LoRA's A in q, k and v, become one: the matrix is read once.
- A sum of products is added up by the products themselves, the thin ones first, so that no kernel
  reads all of them once more; a large product hides most of what it reads.
- 4-bit weights are written out by a kernel of their own (`strixft.step.nf4_kernel`).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
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

aten = torch.ops.aten

THIN = 64
"""Rank up to which a product takes the time that its large operand takes to be read or written."""

ADD_PRODUCT = aten.addmm_.default
"""Adds a product to a matrix, in place."""

_SEEN_THROUGH = {aten.view.default, aten.reshape.default, aten.clone.default}
"""Calls that a product may pass on its way into a sum."""


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


@dataclass(frozen=True, slots=True)
class _Sum:
    """Products that are added up; what is added to them may be another such sum."""

    root: fx.Node
    products: list[fx.Node]


def _source(node: fx.Node) -> fx.Node:
    """The node that a view or copy shows, if nobody else sees it."""
    while node.target in _SEEN_THROUGH and len(node.users) == 1:
        node = node.all_input_nodes[0]
    return node


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    values = [value_of(arg) for arg in node.args if isinstance(arg, fx.Node)]
    return len(values) == 2 and all(value.dtype == value_of(node).dtype for value in values)


def _terms(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """Terms of a sum; `seen` gets the sums within."""
    seen.add(node)
    for term in cast("tuple[fx.Node, fx.Node]", node.args):
        if _is_sum(term) and len(term.users) == 1 and value_of(term).shape == value_of(node).shape:
            yield from _terms(term, seen)
        else:
            yield term


def _product_in(term: fx.Node, root: fx.Node) -> fx.Node | None:
    """The product that a term of a sum is."""
    source = _source(term)
    shapes = {(value_of(n).shape[-1:], value_of(n).numel()) for n in (term, source, root)}
    is_whole = len(shapes) == 1 and value_of(term).shape == value_of(root).shape
    is_own = source.target is aten.mm.default and len(source.users) == 1
    return source if is_whole and is_own else None


def _find_sums(graph: fx.Graph) -> Iterator[_Sum]:
    """Every sum of two products and more, the last first."""
    seen = set[fx.Node]()
    for root in reversed(list(filter(_is_sum, calls(graph, aten.add.Tensor)))):
        if root not in seen:
            terms = list(_terms(root, seen))
            found = {term: _product_in(term, root) for term in terms}
            products = sorted(filter(None, found.values()))
            if len(products) > 1 and len(found) == len(terms):  # no term is added twice
                yield _Sum(root, products)


def _add_up(found: _Sum, joins: Joins) -> None:
    """Let the products of a sum add themselves up, and then what else is added to them."""
    root, graph = found.root, found.root.graph
    others = [term for term in _terms(root, set()) if _source(term) not in found.products]
    total = _total(found.products, joins)
    with graph.inserting_before(root):
        result = call(graph, aten.view.default, total, list(value_of(root).shape))
        for other in others:
            result = call(graph, aten.add.Tensor, other, result)
    replace(root, result)


def _total(products: list[fx.Node], joins: Joins) -> fx.Node:
    """Sum of products: the thin ones as one, the others added to it."""
    graph = products[0].graph
    large = [node for node in products if _depth(node) > THIN]
    first = [node for node in products if _depth(node) <= THIN] or [large.pop(0)]
    with graph.inserting_before(first[0]):
        left, right = ([cast("fx.Node", node.args[side]) for node in first] for side in (0, 1))
        total = call(graph, aten.mm.default, joins(left, 1), joins(right, 0))
    for node in large:
        with graph.inserting_before(node):
            total = call(graph, ADD_PRODUCT, total, *node.args)
    return total


def _depth(product: fx.Node) -> int:
    """Columns of the left matrix: the rank of a product with an adapter's factor."""
    return value_of(cast("fx.Node", product.args[0])).shape[1]


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


def rewrite(graph: fx.Graph) -> None:
    """Rewrite the products of a layer's graph, of forward or of backward."""
    joins = Joins()
    if "bitsandbytes" in sys.modules:
        from strixft.step import nf4_kernel

        nf4_kernel.split_products(graph)
    _write_in_order(graph)
    _join_thin_products(graph, joins)
    for found in list(_find_sums(graph)):
        _add_up(found, joins)
    stable_topological_sort(graph)
    if "bitsandbytes" in sys.modules:
        nf4_kernel.unpack_late(graph)


class Products(CustomGraphPass):
    """The pass as the compiler takes it."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph."""
        rewrite(graph)

    def uuid(self) -> bytes:
        """Tells the compiler's cache of another version."""
        files = sorted(map(str, Path(__file__).parent.glob("*.py")))
        return get_hash_for_files(tuple(files))
