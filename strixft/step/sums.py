"""Sums of products in the graph of a layer, as of LoRA's products and those of the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from strixft.step.graphs import call, calls, num_bytes, origin, replace, value_of

aten = torch.ops.aten

THIN = 64
"""Rank up to which a product takes the time that its large operand takes to be read or written."""

_SEEN_THROUGH = {aten.view.default, aten.reshape.default, aten.clone.default}
"""What a product may pass on its way into a sum."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Products that are added up, and what is added to them: that may be another such sum."""

    root: fx.Node
    thin: list[fx.Node]
    large: list[fx.Node]

    @property
    def lefts(self) -> tuple[fx.Node, ...]:
        """What the large products multiply."""
        return tuple(origin(left_of(node)) for node in self.large)

    @property
    def spared_bytes(self) -> int:
        """What writing and reading between the products would move; the thin ones count as one."""
        between = len(self.large) + bool(self.thin) - 1
        return 2 * between * num_bytes(self.root)

    def replace(self, total: fx.Node) -> None:
        """Let the products' sum take their place."""
        graph, root = self.root.graph, self.root
        with graph.inserting_before(root):
            result = call(graph, aten.view.default, total, list(value_of(root).shape))
            for other in self._others():
                result = call(graph, aten.add.Tensor, other, result)
        replace(root, result)

    def _others(self) -> list[fx.Node]:
        """What is added to the products, as the graph is now."""
        products = {*self.thin, *self.large}
        return [term for term in _terms(self.root, set()) if _source(term) not in products]


def left_of(product: fx.Node) -> fx.Node:
    """The matrix whose rows are multiplied."""
    return cast("fx.Node", product.args[0])


def right_of(product: fx.Node) -> fx.Node:
    """The matrix that they are multiplied by."""
    return cast("fx.Node", product.args[1])


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


def _terms(node: fx.Node, seen: set[fx.Node]) -> Iterator[fx.Node]:
    """What is added up in a sum; `seen` gets the sums within."""
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


def rank(product: fx.Node) -> int:
    """How deep a product is."""
    return value_of(left_of(product)).shape[1]


def _sum_of(root: fx.Node, seen: set[fx.Node]) -> Sum | None:
    terms = list(_terms(root, seen))
    found = {term: _product_in(term, root) for term in terms}
    products = sorted(filter(None, found.values()))
    if len(products) < 2 or len(found) < len(terms):  # a term that is added twice
        return None
    thin = [node for node in products if rank(node) <= THIN]
    large = [node for node in products if rank(node) > THIN]
    return Sum(root, thin, large)


def find_sums(graph: fx.Graph) -> list[Sum]:
    """Every sum of two products and more."""
    seen = set[fx.Node]()
    roots = (node for node in reversed(calls(graph, aten.add.Tensor)) if _is_sum(node))
    sums = [_sum_of(root, seen) for root in roots if root not in seen]
    return [found for found in sums if found is not None]
