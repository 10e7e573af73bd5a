"""The kernels that a graph becomes, their order, and the results that they write.

As inductor makes them (torch 2.11 and 2.13: `ir.StorageBox.should_realize_on_reuse`,
`Scheduler.fuse_nodes`). An elementwise result that only generated code reads is computed again
wherever it is read. One that a product, an attention or the caller reads is written, by a kernel
that writes whatever runs over as many elements and reads the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from strixft.plan.cost import Cost, Layout, kernel_cost, layout_of, made_of
from strixft.step import layers
from strixft.step.compiler import (
    aot_autograd,
    min_cut_rematerialization_partition,
    select_decomp_table,
)
from strixft.step.graphs import is_generated, is_view, writes_4bit_out
from strixft.step.matrix_products import rewrite
from strixft.step.memory_tracker import uncounted
from strixft.support.private_torch import boxed

torch.library.define("strixft::kernel", "(int kernel) -> Tensor[]")

KERNEL = torch.ops.strixft.kernel.default
"""Runs a kernel, by its number in `made`: returns what it writes, and a dispatch mode sees it."""


@dataclass(frozen=True, slots=True)
class Made:
    """A kernel of a graph."""

    written: tuple[Layout, ...]
    cost: Cost


made: list[Made] = []
"""Kernels of all graphs that are compiled."""


@torch.library.impl("strixft::kernel", "CompositeExplicitAutograd")
def _run_kernel(kernel: int) -> list[torch.Tensor]:
    return made_of(made[kernel].written)


MOST_READS = 4
"""A result made of more tensors than this is written if it is used twice, whoever uses it."""

Env = dict[fx.Node, Any]
"""Values of a graph's nodes while it runs."""

Run = Callable[[Env], None]


def _elements(node: fx.Node) -> int:
    """Return the elements that a kernel runs over: the largest of what it reads and writes."""
    values = (source.meta.get("val") for source in (node, *node.all_input_nodes))
    return max((value.numel() for value in values if isinstance(value, torch.Tensor)), default=0)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a result, views looked through."""
    for user in node.users:
        yield from _readers(user) if is_view(user) else (user,)


class Units:
    """A graph in units that run as one: a kernel with its results, or any other operator."""

    def __init__(self, graph: fx.Graph) -> None:
        self.values: dict[fx.Node, set[fx.Node]] = {}
        """Values that each node reads from memory, looked up through views and inlined nodes."""
        self.inlined: set[fx.Node] = set()
        """Elementwise results that are computed again wherever they are read."""
        self._unit: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.values[node] = {v for n in node.all_input_nodes for v in self._read_by(n)}
            if is_generated(node) and not self._is_written(node):
                self.inlined.add(node)
            elif not is_view(node):  # joins the kernel that reads most of what it reads
                unit = self._best(node) if is_generated(node) else None
                self._unit[node] = unit = [] if unit is None else unit
                unit.append(node)
        self._read_from: dict[fx.Node, list[fx.Node]] = {}
        for reader in self._unit:
            for value in self.values[reader]:
                self._read_from.setdefault(value, []).append(reader)

    def _read_by(self, source: fx.Node) -> Iterable[fx.Node]:
        return self.values[source] if self.passes(source) else (source,)

    def passes(self, node: fx.Node) -> bool:
        """Return whether a node has no memory of its own."""
        return node in self.inlined or is_view(node)

    def _is_written(self, node: fx.Node) -> bool:
        readers = list(_readers(node))
        is_sum = torch.Tag.reduction in getattr(node.target, "tags", ())
        is_large = len(readers) > 1 and len(self.values[node]) > MOST_READS
        return is_large or is_sum or not all(map(is_generated, readers))

    def _best(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the kernel that shares most elements with a node and can run with it."""
        scores = ((self._shared(unit, node), unit) for unit in self.all() if is_generated(unit[0]))
        found = sorted((pair for pair in scores if pair[0]), key=lambda pair: -pair[0])
        return next((unit for _, unit in found if not self._is_between(unit, node)), None)

    def _shared(self, unit: list[fx.Node], node: fx.Node) -> int:
        """Return the elements that both read, or that one writes and the other reads."""
        if _elements(unit[0]) != _elements(node):
            return 0
        known = {*unit, *(value for one in unit for value in self.values[one])}
        shared = known & self.values[node]
        return sum(one.meta["val"].numel() for one in shared if "val" in one.meta)

    def _is_between(self, unit: list[fx.Node], node: fx.Node) -> bool:
        """Return whether something else must run after the unit and before the node."""
        look_at = [v for v in self.values[node] if self._unit[v] is not unit]
        seen = set[fx.Node]()
        while look_at:
            value = look_at.pop()
            if value in seen:
                continue
            if self._unit[value] is unit:
                return True
            seen.update(self._unit[value])
            look_at += {v for one in self._unit[value] for v in self.values[one]} - seen
        return False

    def all(self) -> list[list[fx.Node]]:
        """Return every unit, by its first node."""
        return list({id(unit): unit for unit in self._unit.values()}.values())

    def in_order(self) -> list[list[fx.Node]]:
        """Return the units as they run: each after those that it reads from."""
        placed, order = set[int](), list[list[fx.Node]]()

        def place(unit: list[fx.Node]) -> None:
            if id(unit) in placed:
                return
            placed.add(id(unit))
            for value in sorted({v for node in unit for v in self.values[node]}):
                place(self._unit[value])
            order.append(unit)

        for unit in self.all():
            place(unit)
        return order

    def reads(self, unit: list[fx.Node]) -> list[fx.Node]:
        """Return the values that a kernel reads, in the graph's order: traces are freed alike."""
        return sorted({value for node in unit for value in self.values[node]} - {*unit})

    def views(self, node: fx.Node) -> list[fx.Node]:
        """Return the views that a node reads, the innermost first."""
        found = dict[fx.Node, None]()
        for source in node.all_input_nodes:
            if self.passes(source):
                found |= dict.fromkeys([*self.views(source), source])
        return list(found)

    def stays_inside(self, node: fx.Node) -> bool:
        """Return whether a node is never written: inlined, or read by its own kernel alone."""
        if not is_generated(node):
            return False
        unit = self._unit.get(node)
        return all(self._unit[reader] is unit for reader in self._read_from.get(node, ()))


def _kernel(unit: list[fx.Node], units: Units) -> Run:
    """Return what makes a kernel's results, of any shapes."""
    read = [n.meta["val"] for n in units.reads(unit) if isinstance(n.meta.get("val"), torch.Tensor)]
    written = [node for node in unit if not units.stays_inside(node)]
    values = [node.meta["val"] for node in written]
    unpacks = any(writes_4bit_out(node.target) for node in written)
    cost, number = kernel_cost(read, values, unpacks=unpacks), len(made)
    made.append(Made(tuple(map(layout_of, values)), cost))

    def run(env: Env) -> None:
        env.update(zip(written, KERNEL(number), strict=True))

    return run


def _operator(node: fx.Node) -> Run:
    """Return what runs one node of the graph."""
    target = cast("Callable[..., Any]", node.target)

    def run(env: Env) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = target(*args, **kwargs)

    return run


def _steps(units: Units) -> Iterator[tuple[Run, list[fx.Node]]]:
    """Yield what to run, each with the nodes that nothing reads after it."""
    parts: list[tuple[Run | None, list[fx.Node]]] = []
    for unit in units.in_order():
        node = unit[0]
        if is_generated(node):
            parts.append((_kernel(unit, units), units.reads(unit)))
            continue
        views = units.views(node)
        parts += [(_operator(view), view.all_input_nodes) for view in views]
        # inputs and constants are there, and the output is asked for at the end
        run = _operator(node) if node.op == "call_function" else None
        parts.append((run, [*views, *node.all_input_nodes]))
    last = {node: number for number, (_, read) in enumerate(parts) for node in read}
    done_with: dict[int, list[fx.Node]] = {}
    for node, number in last.items():
        done_with.setdefault(number, []).append(node)
    for number, (run, _) in enumerate(parts):
        if run is not None:
            yield run, done_with.get(number, [])


@dataclass(slots=True)
class _Compiled:
    """Compiled layers that Dynamo holds for plans."""

    like: Hashable = None
    """See `planned_kernels`; None where it holds nothing."""
    num_graphs: int = 0
    is_shared: bool = False
    """The next trace may use them too."""


_compiled = _Compiled()


def num_compiled() -> int:
    """Return the number of graphs that the plan's step has by now."""
    return _compiled.num_graphs


def _compile(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
    """Return what runs a graph on `meta` as its kernels would."""
    with uncounted():
        rewrite(module.graph)
    _compiled.num_graphs += 1
    *_, last = nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    constants = {node: getattr(module, node.target) for node in nodes if node.op == "get_attr"}
    steps = list(_steps(Units(module.graph)))

    def run(values: list[Any]) -> Any:
        env: Env = {**constants, **dict(zip(inputs, values, strict=True))}
        values.clear()  # what backward needs no more is freed
        for act, done_with in steps:
            act(env)
            for node in done_with:
                del env[node]
        return fx.map_arg(last.args, env.__getitem__)[0]

    return boxed(run)


def make_backend(compile_graph: Callable[..., Any]) -> Any:
    """Make a backend for `torch.compile` that splits and decomposes graphs as inductor does.

    Args:
        compile_graph: Takes a graph, of forward or of backward, and gives what runs it.
    """
    return aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )


_backend = make_backend(_compile)


def _forget(like: Hashable = None) -> None:
    if _compiled.like != like:
        torch.compiler.reset()
        made.clear()
        _compiled.like, _compiled.num_graphs = like, 0


@contextlib.contextmanager
def planned_kernels(like: Hashable) -> Iterator[None]:
    """Compile layers, within this block, to what a plan counts.

    Args:
        like: Everything but the micro-batch that decides how a step is compiled.
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
    """Let traces in this block share compiled layers, one after the other, where they are alike."""
    before, _compiled.is_shared = _compiled.is_shared, True
    try:
        yield
    finally:
        _compiled.is_shared = before
        if not before:
            _forget()
