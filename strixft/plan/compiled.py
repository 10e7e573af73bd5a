"""Compiled layers on `meta`: the compiler's own choice of what is kept, and what its kernels hold.

The partitioner that torch.compile uses splits forward and backward. Then the graphs are run
operator by operator, in the order in which kernels would run, and of the elementwise ones only
those results are counted that a kernel writes out for others.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from strixft.step import layers
from strixft.step.tracker import uncounted


def _is_view(node: fx.Node) -> bool:
    target: Any = node.target
    return bool(getattr(target, "is_view", False)) or "view" in str(target)


def _is_generated(node: fx.Node) -> bool:
    """Whether the compiler writes the kernel: elementwise, or a sum along a row."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    fusible = torch.Tag.pointwise in tags or torch.Tag.reduction in tags
    return fusible and not _is_view(node)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads, views looked through."""
    for source in node.all_input_nodes:
        yield from _sources(source) if _is_view(source) else (source,)


def _elements(node: fx.Node) -> int:
    """Elements that a kernel runs over: the largest of what it reads and writes."""
    values = (source.meta.get("val") for source in (node, *node.all_input_nodes))
    return max((value.numel() for value in values if isinstance(value, torch.Tensor)), default=0)


class _Order:
    """Nodes in the order in which kernels run, and the generated ones that run as one.

    A kernel runs when something asks for one of its results. It then makes all results that can be
    made by then, run over as many elements, and read what it reads or makes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self._waiting = {node for node in self._nodes if _is_generated(node)}
        self.nodes: list[fx.Node] = []
        self.kernels: list[list[fx.Node]] = []
        self._placed: set[fx.Node] = set()
        for node in self._nodes:
            if not _is_generated(node):
                self._place(node)

    def _place(self, node: fx.Node) -> None:
        if node in self._placed:
            return
        for source in node.all_input_nodes:
            if source in self._waiting:
                self._run_kernel(source)
            self._place(source)
        self._placed.add(node)
        self.nodes.append(node)

    def _is_ready(self, node: fx.Node, kernel: set[fx.Node]) -> bool:
        return all(source in self._placed or source in kernel for source in _sources(node))

    def _needed(self, node: fx.Node) -> set[fx.Node]:
        """A generated node with those that it is made of."""
        found, look_at = set[fx.Node](), [node]
        while look_at:
            one = look_at.pop()
            if one in self._waiting and one not in found:
                found.add(one)
                look_at += _sources(one)
        return found

    def _run_kernel(self, node: fx.Node) -> None:
        kernel = self._needed(node)
        for source in {source for one in kernel for source in _sources(one)} - kernel:
            self._place(source)
        read = {source for one in kernel for source in _sources(one)}
        for one in self._nodes:
            joins = one in self._waiting and one not in kernel and _elements(one) == _elements(node)
            if joins and self._is_ready(one, kernel) and read.intersection((one, *_sources(one))):
                kernel.add(one)
                read.update(_sources(one))
        ordered = [one for one in self._nodes if one in kernel]
        self._waiting -= kernel
        self.kernels.append(ordered)
        for one in ordered:
            self._place(one)


class _Kernels(fx.Interpreter):
    """Runs a graph as its kernels would, as far as memory is concerned."""

    def __init__(self, module: fx.GraphModule) -> None:
        order = _Order(module.graph)
        for before, after in itertools.pairwise(order.nodes):
            before.append(after)
        super().__init__(module)
        for kernel in order.kernels:  # it gives back what it read when it is done
            read = [one for node in kernel for one in self.user_to_last_uses.pop(node, ())]
            self.user_to_last_uses[kernel[-1]] = read
        of_kernel = {node: set(kernel) for kernel in order.kernels for node in kernel}
        self._inside = {node for node in of_kernel if _stays_inside(node, of_kernel[node])}

    def run_node(self, node: fx.Node) -> Any:
        if node not in self._inside:
            return super().run_node(node)
        with uncounted():
            return super().run_node(node)


def _stays_inside(node: fx.Node, kernel: set[fx.Node]) -> bool:
    """Whether nothing but its own kernel reads a result, or a view of it."""
    return all(
        user in kernel or (_is_view(user) and _stays_inside(user, kernel)) for user in node.users
    )


@dataclass(slots=True)
class _Compiled:
    """What Dynamo holds for plans."""

    like: Hashable = None
    """What tells its steps from others; None where it holds nothing."""
    num_graphs: int = 0
    is_shared: bool = False
    """Whether the next trace may use it too."""


_compiled = _Compiled()


def num_compiled() -> int:
    """Graphs that the plan's step has by now."""
    return _compiled.num_graphs


def _compile(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
    kernels = _Kernels(module)
    _compiled.num_graphs += 1

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()  # the caller's references would keep what backward needs no more
        result = kernels.boxed_run(values)
        kernels.env, kernels.args_iter = {}, iter(())  # or it would keep them till the next run
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


_backend = aot_autograd(
    fw_compiler=_compile,
    bw_compiler=_compile,
    partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    decompositions=select_decomp_table(),
)


def _forget(like: Hashable = None) -> None:
    if _compiled.like != like:
        torch._dynamo.reset()
        _compiled.like, _compiled.num_graphs = like, 0


@contextlib.contextmanager
def planned_kernels(like: Hashable) -> Iterator[None]:
    """Within this block, layers compile to what a plan counts.

    Args:
        like: What tells the step from others: its shapes, and what decides how it is compiled.
    """
    _forget(like)
    before, layers.BACKEND = layers.BACKEND, _backend
    try:
        yield
    finally:
        layers.BACKEND = before
        if not _compiled.is_shared:
            _forget()


@contextlib.contextmanager
def shared_kernels() -> Iterator[None]:
    """Traces in this block share what was compiled, one after the other, where they are alike."""
    before, _compiled.is_shared = _compiled.is_shared, True
    try:
        yield
    finally:
        _compiled.is_shared = before
        if not before:
            _forget()
