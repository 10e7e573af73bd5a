"""Sums of products in compiled layers: one product of matrices that lie beside each other.

x·Wᵀ + z·Bᵀ is [x z]·[W B]ᵀ. So nothing is written to be read and added to again, for a product
that is at most 64 deeper. The kernel that makes x, or writes W out, puts it right beside the
others; a W that is there has room for B (`strixft.step.room`). What else is there already has to be
copied, so sums are only joined where that moves less than it spares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from strixft.step.beside import BESIDE, FILL
from strixft.step.graphs import (
    Joins,
    call,
    depends,
    erase_unused,
    is_generated,
    is_view,
    num_bytes,
    origin,
    value_of,
)
from strixft.step.room import ALIGNED, ROOM, room_of
from strixft.step.sums import Sum, left_of, rank, right_of

aten = torch.ops.aten


def join_sums(graph: fx.Graph, sums: Sequence[Sum], joins: Joins) -> list[Sum]:
    """Let each sum be one product where that moves less; the sums that are left."""
    groups: dict[tuple[fx.Node, ...], list[Sum]] = defaultdict(list)
    for found in sums:
        groups[found.lefts].append(found)
    rest: list[Sum] = []
    for group in groups.values():
        join = _Join(group, joins)
        if join.is_possible() and join.is_worth_it():
            join.do()
            stable_topological_sort(graph)
        else:
            rest += group
    return rest


class _Join:
    """Sums whose large products multiply the same matrices, as in q, k and v."""

    def __init__(self, group: list[Sum], joins: Joins) -> None:
        self._group, self._joins = group, joins
        thin = (left_of(node) for found in group for node in found.thin)
        self._tail = sorted(set(thin))
        self._depth = sum(map(rank, group[0].large))
        self._ranks = sum(value_of(node).shape[1] for node in self._tail)

    def _span(self, found: Sum) -> tuple[int, int]:
        """Which part of the tail a sum uses."""
        first = self._tail.index(left_of(found.thin[0]))
        return first, first + len(found.thin)

    def is_possible(self) -> bool:
        """Whether each sum uses a stretch of a short tail, and no product is made from another."""
        if not self._depth or self._ranks > ROOM or any(not found.thin for found in self._group):
            return False
        for found in self._group:
            first, end = self._span(found)
            if [left_of(node) for node in found.thin] != self._tail[first:end]:
                return False
        products = {node for found in self._group for node in (*found.thin, *found.large)}
        return not depends([n for p in products for n in p.all_input_nodes], products)

    def is_worth_it(self) -> bool:
        """Whether what has to be copied is at most half of what is spared."""
        group = self._group
        copied = sum(map(_copied_bytes, group[0].lefts))
        copied += sum(
            _copied_bytes(_untransposed(right_of(node)))
            for found in group
            if not self._has_room(found)
            for node in found.large
        )
        return 2 * copied <= sum(found.spared_bytes for found in group)

    def do(self) -> None:
        """Put the sums' products in their places."""
        graph = self._group[0].root.graph
        with graph.inserting_before(min(self._group[0].large)):
            left = self._left([left_of(node) for node in self._group[0].large])
            totals = [
                call(graph, aten.mm.default, left, self._right(found)) for found in self._group
            ]
        for found, total in zip(self._group, totals, strict=True):
            found.replace(total)

    def _left(self, matrices: list[fx.Node]) -> fx.Node:
        """What is multiplied; the thin matrices come last, as they may be made from the others."""
        graph, rows = matrices[0].graph, _rows(matrices)
        whole = _side_by_side(graph, [_part(n, rows) for n in matrices], len(rows), self._ranks)
        flat = call(graph, aten.view.default, whole, [-1, value_of(whole).shape[-1]])
        ends = list(accumulate(value_of(node).shape[1] for node in matrices))
        for matrix, start, end in zip(matrices, [0, *ends], ends, strict=False):
            if is_generated(origin(matrix)):
                _see(matrix, call(graph, aten.slice.Tensor, flat, 1, start, end))
        filled = call(graph, FILL, flat, self._joins(self._tail, 1), 1, ends[-1])
        return _columns(filled, self._depth + self._ranks)

    def _right(self, found: Sum) -> fx.Node:
        """What a sum multiplies the joined matrices by, zeros for what it has no part in."""
        graph, matrices = found.root.graph, [right_of(node) for node in found.large]
        dim = int(matrices[0].target is aten.permute.default)
        matrices = [_transposed(node) for node in matrices] if dim else matrices
        tail = self._right_tail(found, dim)
        if self._has_room(found):
            right = _in_room(matrices[0], tail, dim)
        else:
            right = _side_by_side(graph, [*matrices, tail], dim, 0)
        if not dim:
            return right
        right = _columns(right, self._depth + self._ranks)
        return call(graph, aten.permute.default, right, [1, 0])

    def _has_room(self, found: Sum) -> bool:
        """Whether there is room beside the weight that a sum multiplies by."""
        matrix = _untransposed(right_of(found.large[0]))
        has_room = _is_given(matrix) and room_of(value_of(matrix)) >= self._ranks
        return has_room and len(found.large) == 1

    def _right_tail(self, found: Sum, dim: int) -> fx.Node:
        thin = [right_of(node) for node in found.thin]
        joined = self._joins([_transposed(node) for node in thin] if dim else thin, dim)
        first, end = self._span(found)
        before, after = (
            sum(value_of(node).shape[1] for node in nodes)
            for nodes in (self._tail[:first], self._tail[end:])
        )
        return _padded(joined, dim, before, after)


def _is_given(node: fx.Node) -> bool:
    """Whether a graph has it from the layer, in backward perhaps transposed by forward."""
    return node.op == "placeholder" and node.name.startswith(("primals", "permute", "arg"))


def _in_room(matrix: fx.Node, tail: fx.Node, dim: int) -> fx.Node:
    """A matrix with another one written into the room beside or below it."""
    graph, size, strides = matrix.graph, list(value_of(matrix).shape), value_of(matrix).stride()
    start, size[dim] = size[dim], size[dim] + value_of(tail).shape[dim]
    whole = call(graph, aten.as_strided.default, matrix, size, list(strides))
    return call(graph, FILL, whole, tail, dim, start)


def _side_by_side(graph: fx.Graph, parts: list[fx.Node], dim: int, room: int) -> fx.Node:
    """Matrices in one, with room for so many columns more, and with aligned rows."""
    if dim:
        width = room + sum(value_of(part).shape[dim] for part in parts)
        room += -width % ALIGNED
    return call(graph, BESIDE, parts, dim, room)


def _columns(matrix: fx.Node, count: int) -> fx.Node:
    """The first columns of a matrix."""
    if value_of(matrix).shape[1] == count:
        return matrix
    return call(matrix.graph, aten.slice.Tensor, matrix, 1, 0, count)


def _untransposed(node: fx.Node) -> fx.Node:
    while node.target is aten.permute.default:
        node = node.all_input_nodes[0]
    return node


def _transposed(node: fx.Node) -> fx.Node:
    if node.target is aten.permute.default:
        return node.all_input_nodes[0]
    return call(node.graph, aten.permute.default, node, [1, 0])


def _padded(node: fx.Node, dim: int, before: int, after: int) -> fx.Node:
    """A matrix with columns (1) or rows (0) of zeros around it."""
    if not before and not after:
        return node
    padding = [before, after] if dim else [0, 0, before, after]
    return call(node.graph, aten.constant_pad_nd.default, node, padding, 0.0)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a matrix, views looked through."""
    for user in node.users:
        yield from _readers(user) if is_view(user) else (user,)


def _copied_bytes(matrix: fx.Node) -> int:
    """What it moves to bring a matrix beside others."""
    if not is_generated(matrix):
        return 2 * num_bytes(matrix)
    is_kept = any(reader.op == "output" for reader in _readers(matrix))
    return num_bytes(matrix) if is_kept else 0


def _rows(matrices: list[fx.Node]) -> list[int]:
    """How the rows of matrices are counted by the kernel that makes the first of them."""
    for matrix in matrices:
        source = value_of(origin(matrix))
        if is_generated(origin(matrix)) and source.shape[-1] == value_of(matrix).shape[1]:
            return list(source.shape[:-1])
    return [value_of(matrices[0]).shape[0]]


def _part(matrix: fx.Node, rows: list[int]) -> fx.Node:
    """A matrix as its kernel writes it; a copy where it is kept for backward, or has other rows."""
    graph, shape, source = matrix.graph, [*rows, value_of(matrix).shape[1]], origin(matrix)
    if list(value_of(source).shape) != shape:
        return _copy_of(call(graph, aten.view.default, matrix, shape), source)
    return _copy_of(source, source) if _copied_bytes(source) else source


def _copy_of(node: fx.Node, source: fx.Node) -> fx.Node:
    """By the kernel that makes it, where one is generated; else by one of its own."""
    return call(node.graph, aten.clone.default, node) if is_generated(source) else node


def _see(matrix: fx.Node, place: fx.Node) -> None:
    """Let products read a matrix where it lies now."""
    shape = value_of(matrix).shape
    same = [node for node in _views(origin(matrix)) if value_of(node).shape == shape]
    for node in same:
        node.replace_all_uses_with(place, delete_user_cb=_multiplies)
        erase_unused(node)


def _multiplies(node: fx.Node) -> bool:
    return node.target in (aten.mm.default, aten.addmm.default, aten.permute.default)


def _views(source: fx.Node) -> Iterator[fx.Node]:
    """A matrix and its views, its rows counted in another way."""
    yield source
    for user in list(source.users):
        if user.target in (aten.view.default, aten.reshape.default):
            yield from _views(user)
