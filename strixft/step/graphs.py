"""Graphs of compiled layers: reading, adding, replacing and sorting calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from strixft.step.compiler import fake_result

aten = torch.ops.aten


def value_of(node: fx.Node) -> Tensor:
    """Return a call's result, without data."""
    value: Tensor = node.meta["val"]
    return value


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add a call where the graph inserts now, with what is known of its result."""
    node = graph.call_function(target, args)
    node.meta["val"] = fake_result(target, fx.map_arg(args, value_of))
    return node


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """Return every call of an operator, in order."""
    return list(graph.find_nodes(op="call_function", target=target))


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let another call take a call's place; what only the old one has used goes with it."""
    node.replace_all_uses_with(by)
    _erase_unused(node)


def _erase_unused(node: fx.Node) -> None:
    if node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unused(source)


def sort(graph: fx.Graph) -> None:
    """Move calls behind what they read, and no others.

    As inductor's `stable_topological_sort` does, whose import takes a second.
    """
    pending, waiting = list(reversed(graph.nodes)), defaultdict[fx.Node, list[fx.Node]](list)
    ready, last = set[fx.Node](), None
    while pending:
        node, read = pending.pop(), list[Any]()
        fx.map_arg((node.args, node.kwargs), read.append)
        if missing := [source for source in read if source not in ready]:
            waiting[missing[-1]].append(node)
            continue
        ready.add(node)
        if last is not None and last.next is not node:
            last.append(node)
        last = node
        pending += reversed(waiting.pop(node, []))


def writes_4bit_out(target: Any) -> bool:
    """Tell whether an operator writes 4-bit weights out; bitsandbytes may not be installed."""
    return str(target).startswith("bitsandbytes.dequantize_4bit")


def is_view(node: fx.Node) -> bool:
    """Tell whether a call's result is its argument's memory."""
    target: Any = node.target
    is_reshape = target is aten.reshape.default  # what inductor makes of a view
    is_named = getattr(target, "is_view", False) or "view" in str(target) or is_reshape
    return node.op == "call_function" and is_named


_GENERATED = {aten.constant_pad_nd.default, aten.rand.default}  # a mask of dropout is drawn inside


def is_generated(node: fx.Node) -> bool:
    """Tell whether the compiler writes the kernel: elementwise, a sum of rows, 4-bit weights."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False  # of several results, as of `var_mean`, none is generated
    if writes_4bit_out(node.target) or node.target in _GENERATED:
        return True
    tags = getattr(node.target, "tags", ())
    fusible = torch.Tag.pointwise in tags or torch.Tag.reduction in tags
    return fusible and not is_view(node)
