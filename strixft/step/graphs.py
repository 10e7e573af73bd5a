"""Graphs of compiled layers: reading, adding and replacing calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode


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
    _erase(node)


def _erase(node: fx.Node) -> None:
    if node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase(source)
