"""Products of compiled layers: a pass over the graph of a layer, forward or backward.

The result stays the same up to rounding; less of it moves through memory.

- Thin products of one matrix, as by LoRA's A in q, k and v, become one: the matrix is read once.
- A sum of products is added up by the products themselves, the thin ones first, so that no kernel
  reads all of them once more; a large product hides most of what it reads.
- 4-bit weights are written out by a kernel of their own and then multiplied, which bitsandbytes
  does inside its product (`strixft.step.lowering` generates the kernel).

Shapes: T tokens; a 4-bit weight is (N, K), packed in N·K / 2 bytes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx

from strixft.step.graphs import call, calls, is_generated, is_view, replace, sort, value_of

aten, bnb = torch.ops.aten, torch.ops.bitsandbytes

THIN = 64
"""Rank up to which a product takes the time that its large operand takes to be read or written."""

_SEEN_THROUGH = {aten.view.default, aten.reshape.default, aten.clone.default}
"""Calls that a product may pass on its way into a sum."""


MOST_FUSED_ROWS = 1536
"""Tokens up to which bitsandbytes may multiply without writing the weights out (0.50)."""


def rewrite(graph: fx.Graph) -> None:
    """Rewrite the products of a layer's graph, of forward or of backward."""
    join, has_4bit = _Join(), "bitsandbytes" in sys.modules
    if has_4bit:
        _split_products(graph)
    _write_in_order(graph)
    _join_thin_products(graph, join)
    for root, products in list(_find_sums(graph)):
        _add_up(root, products, join)
    sort(graph)
    if has_4bit:
        _unpack_late(graph)


class _Join:
    """Puts matrices behind each other along a dimension; those that were before are used again."""

    def __init__(self) -> None:
        self._joined: dict[tuple[int, tuple[fx.Node, ...]], fx.Node] = {}

    def __call__(self, nodes: Sequence[fx.Node], dim: int) -> fx.Node:
        if len(nodes) == 1:
            return nodes[0]
        key = dim, tuple(nodes)
        if key not in self._joined:
            graph = nodes[0].graph
            if all(node.target is aten.permute.default for node in nodes):
                whole = self([node.all_input_nodes[0] for node in nodes], 1 - dim)
                self._joined[key] = call(graph, aten.permute.default, whole, [1, 0])
            else:
                self._joined[key] = call(graph, aten.cat.default, list(nodes), dim)
        return self._joined[key]


# Order in memory


def _write_in_order(graph: fx.Graph) -> None:
    """Let a kernel write a result in the order in which an operator reads it through a view.

    The compiler lets a kernel write in the order of its dimensions, whatever strides they have, and
    then copies, as for queries and keys between their rotation and attention.
    """
    for node in graph.nodes:
        is_read = any(not is_generated(user) and not is_view(user) for user in node.users)
        if is_view(node) and is_read and _is_reordered(node):
            with graph.inserting_after(node):
                own = call(graph, aten.clone.default, node)
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _is_reordered(node: fx.Node) -> bool:
    source = node
    while is_view(source):
        source = source.all_input_nodes[0]
    return (
        is_generated(source)
        and isinstance(value_of(node), Tensor)  # a split gives several
        and value_of(node).is_contiguous()
        and not value_of(source).is_contiguous()
    )


# Thin products


def _join_thin_products(graph: fx.Graph, join: _Join) -> None:
    """Make products one that share their left (0) or right (1) matrix, and whose other is thin."""
    for shared in (0, 1):
        groups = defaultdict(list)
        for node in calls(graph, aten.mm.default):
            if value_of(node).shape[1 - shared] <= THIN:
                groups[node.args[shared]].append(node)
        for group in groups.values():
            others = [cast("fx.Node", node.args[1 - shared]) for node in group]
            if len(group) > 1 and not _depends(others, {*group}):
                _join_products(group, others, shared, join)
                sort(graph)


def _depends(nodes: Iterable[fx.Node], on: set[fx.Node]) -> bool:
    """Tell whether any node is computed from one of others, in a graph that is sorted."""
    first, seen, look_at = min(on), set[fx.Node](), list(nodes)
    while look_at:
        node = look_at.pop()
        if node in on:
            return True
        seen.add(node)
        look_at += [n for n in node.all_input_nodes if n >= first and n not in seen]
    return False


def _join_products(group: list[fx.Node], others: list[fx.Node], shared: int, join: _Join) -> None:
    """Multiply a shared (T, C) by r columns of each, as one (T, n·r); or r rows of each by it."""
    graph, dim = group[0].graph, 1 - shared
    ends = list(accumulate(value_of(node).shape[dim] for node in group))
    with graph.inserting_before(group[0]):
        operands = [cast("fx.Node", group[0].args[shared]), join(others, dim)]
        joined = call(graph, aten.mm.default, *(operands if shared == 0 else operands[::-1]))
        pieces = [
            call(graph, aten.slice.Tensor, joined, dim, start, end)
            for start, end in pairwise([0, *ends])
        ]
    for node, piece in zip(group, pieces, strict=True):
        replace(node, piece)


# Sums


def _source(node: fx.Node) -> fx.Node:
    """Return the call that a view or copy shows, if nobody else sees it."""
    while node.target in _SEEN_THROUGH and len(node.users) == 1:
        node = node.all_input_nodes[0]
    return node


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    values = [value_of(arg) for arg in node.args if isinstance(arg, fx.Node)]
    return len(values) == 2 and all(value.dtype == value_of(node).dtype for value in values)


def _terms(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the terms of a sum; `seen` gets the sums within."""
    seen.add(node)
    for term in cast("tuple[fx.Node, fx.Node]", node.args):
        if _is_sum(term) and len(term.users) == 1 and value_of(term).shape == value_of(node).shape:
            yield from _terms(term, seen)
        else:
            yield term


def _product_in(term: fx.Node, root: fx.Node) -> fx.Node | None:
    """Return the product that a term of a sum is, if nothing else reads it."""
    source = _source(term)
    shapes = {(value_of(n).shape[-1:], value_of(n).numel()) for n in (term, source, root)}
    is_whole = len(shapes) == 1 and value_of(term).shape == value_of(root).shape
    is_own = source.target is aten.mm.default and len(source.users) == 1
    return source if is_whole and is_own else None


def _find_sums(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield each sum of two products and more, with these products, the last sum first.

    Another such sum may be added to the products.
    """
    seen = set[fx.Node]()
    for root in reversed(list(filter(_is_sum, calls(graph, aten.add.Tensor)))):
        if root not in seen:
            terms = list(_terms(root, seen))
            found = {term: _product_in(term, root) for term in terms}
            products = sorted(filter(None, found.values()))
            if len(products) > 1 and len(found) == len(terms):  # no term is added twice
                yield root, products


def _add_up(root: fx.Node, products: list[fx.Node], join: _Join) -> None:
    """Let products add themselves up, and add the other terms of the sum to their total."""
    graph = root.graph
    others = [term for term in _terms(root, set()) if _source(term) not in products]
    total = _total(products, join)
    with graph.inserting_before(root):
        result = call(graph, aten.view.default, total, list(value_of(root).shape))
        for other in others:
            result = call(graph, aten.add.Tensor, other, result)
    replace(root, result)


def _total(products: list[fx.Node], join: _Join) -> fx.Node:
    """Make the thin products one, and let each large one add to it in place; (T, columns)."""
    graph = products[0].graph
    thin = [node for node in products if _depth(node) <= THIN]
    first = thin or products[:1]
    with graph.inserting_before(first[0]):
        left, right = ([cast("fx.Node", node.args[at]) for node in first] for at in (0, 1))
        total = call(graph, aten.mm.default, join(left, 1), join(right, 0))
    for node in products:
        if node not in first:
            with graph.inserting_before(node):
                total = call(graph, aten.addmm_.default, total, *node.args)
    return total


def _depth(product: fx.Node) -> int:
    """Return the columns of the left matrix: the rank, where it is an adapter's."""
    return value_of(cast("fx.Node", product.args[0])).shape[1]


# 4-bit weights


def _split_products(graph: fx.Graph) -> None:
    """Let 4-bit weights be written out, and be multiplied by an ordinary product."""
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
        weight = call(graph, bnb.dequantize_4bit.default, *stored)  # (N, K)
        columns = call(graph, aten.permute.default, weight, [1, 0])
        rows = call(graph, aten.view.default, source, [-1, value_of(weight).shape[1]])  # (T, K)
        product = call(graph, aten.mm.default, rows, columns)  # (T, N)
        result = call(graph, aten.view.default, product, list(value_of(node).shape))
    replace(node, result)


def _unpack_late(graph: fx.Graph) -> None:
    """Write weights out right before they are multiplied: one at a time is in memory."""
    passed = (bnb.dequantize_4bit.default, aten.permute.default)
    for weight in calls(graph, passed[0]):
        path = [weight]  # the weight, perhaps its transpose, the product
        while len(path[-1].users) == 1 and path[-1].target in passed:
            path += path[-1].users
        if len(path) > 1:
            _bring(path[-2], path[-1])


def _bring(node: fx.Node, place: fx.Node) -> None:
    """Move a call, and what only it needs, right before another one."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and len(source.users) == 1:
            _bring(source, place)
    place.prepend(node)
