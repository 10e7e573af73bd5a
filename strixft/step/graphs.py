"""Graphs of compiled layers: reading, adding and replacing calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode

aten = torch.ops.aten

_RESHAPE = aten.reshape.default  # what inductor makes of a view


def value_of(node: fx.Node) -> Tensor:
    """A call's result, without data."""
    value: Tensor = node.meta["val"]
    return value


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new call, with what is known of its result."""
    node, values = graph.call_function(target, args), fx.map_arg(args, value_of)
    with cast("FakeTensorMode", detect_fake_mode(values)):
        node.meta["val"] = target(*values)
    return node


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """Every call of an operator, in order."""
    return list(graph.find_nodes(op="call_function", target=target))


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let another call take a call's place; what only the old one has used goes with it."""
    node.replace_all_uses_with(by)
    erase_unused(node)


def erase_unused(node: fx.Node) -> None:
    """Remove a call that nobody uses, and what only it has used."""
    if node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            erase_unused(source)


def origin(node: fx.Node) -> fx.Node:
    """What a matrix is a view of, its rows counted in another way."""
    while node.target in (aten.view.default, aten.reshape.default):
        node = node.all_input_nodes[0]
    return node


# Kinds of calls


def writes_4bit_out(target: Any) -> bool:
    """Whether an operator writes 4-bit weights out; bitsandbytes may not be there to ask."""
    return str(target).startswith("bitsandbytes.dequantize_4bit")


def is_view(node: fx.Node) -> bool:
    """Whether a call's result is its argument's memory."""
    target: Any = node.target
    named = getattr(target, "is_view", False) or "view" in str(target) or target is _RESHAPE
    return node.op == "call_function" and named


def is_generated(node: fx.Node) -> bool:
    """Whether the compiler writes the kernel: elementwise, a sum along a row, 4-bit weights."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not isinstance(node.meta.get("val"), Tensor):  # several results, as of `var_mean`
        return False
    if writes_4bit_out(node.target) or node.target is aten.constant_pad_nd.default:
        return True
    tags = node.target.tags
    fusible = torch.Tag.pointwise in tags or torch.Tag.reduction in tags
    return fusible and not is_view(node)


# Order, and matrices beside each other


def depends(nodes: Iterable[fx.Node], on: set[fx.Node]) -> bool:
    """Whether any of the nodes is computed from one of others, in a graph that is sorted."""
    first, seen, look_at = min(on), set[fx.Node](), list(nodes)
    while look_at:
        node = look_at.pop()
        if node in on:
            return True
        seen.add(node)
        look_at += [n for n in node.all_input_nodes if n >= first and n not in seen]
    return False


class Joins:
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
        if (whole := _whole(nodes, dim)) is not None:
            return whole
        if all(node.target is aten.permute.default for node in nodes):
            untransposed = [node.all_input_nodes[0] for node in nodes]
            return call(graph, aten.permute.default, self(untransposed, 1 - dim), [1, 0])
        return call(graph, aten.cat.default, list(nodes), dim)


def _whole(nodes: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The matrix that was cut along a dimension into just these."""
    cuts = [origin(node) for node in nodes]
    if any(cut.target is not aten.slice.Tensor for cut in cuts):
        return None
    whole, place, _, end = cast("tuple[fx.Node, int, int, int]", cuts[-1].args)
    starts = [0, *(cut.args[3] for cut in cuts[:-1])]
    same = all(cut.args[:3] == (whole, dim, start) for cut, start in zip(cuts, starts, strict=True))
    return whole if same and place == dim and end == value_of(whole).shape[dim] else None
