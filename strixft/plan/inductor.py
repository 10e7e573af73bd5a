"""Which kernels a graph becomes, in which order they run, and which results they write.

As inductor does it (torch 2.11 and 2.13: `ir.StorageBox.should_realize_on_reuse`,
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
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from strixft.step import layers
from strixft.step.graphs import is_generated, is_view, writes_4bit_out
from strixft.step.products import rewrite
from strixft.step.tracker import uncounted

torch.library.define("strixft::kernel", "(Tensor[] read, Tensor[] written, bool unpacks) -> ()")

KERNEL = torch.ops.strixft.kernel.default
"""Tells a dispatch mode that a kernel has run, what it has read and written, and whether those are
4-bit weights, written out."""


@torch.library.impl("strixft::kernel", "CompositeExplicitAutograd")
def _kernel(read: list[torch.Tensor], written: list[torch.Tensor], unpacks: bool) -> None:
    pass


MOST_READS = 4
"""A result made of more tensors than this is written if it is used twice, whoever uses it."""


def _is_sum(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _elements(node: fx.Node) -> int:
    """Elements that a kernel runs over: the largest of what it reads and writes."""
    values = (source.meta.get("val") for source in (node, *node.all_input_nodes))
    return max((value.numel() for value in values if isinstance(value, torch.Tensor)), default=0)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a result, views looked through."""
    for user in node.users:
        yield from _readers(user) if is_view(user) else (user,)


Env = dict[fx.Node, Any]


class _New:
    """Makes a node's result."""

    def __init__(self, node: fx.Node) -> None:
        value = node.meta["val"]
        self._layout, self._dtype = (value.shape, value.stride()), value.dtype

    def __call__(self) -> torch.Tensor:
        with uncounted():
            return torch.empty_strided(*self._layout, dtype=self._dtype, device="meta")


class Units:
    """What runs as one: a kernel with the results that it writes, or any other operator."""

    def __init__(self, graph: fx.Graph) -> None:
        self.values: dict[fx.Node, set[fx.Node]] = {}
        """What each node reads from memory: views and what is computed again looked through."""
        self.inlined: set[fx.Node] = set()
        self._unit: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.values[node] = {v for n in node.all_input_nodes for v in self._read_by(n)}
            if is_generated(node) and not self._is_written(node):
                self.inlined.add(node)
            elif not is_view(node):
                self._add(node)
        self._read_from: dict[fx.Node, list[fx.Node]] = {}
        for reader in self._unit:
            for value in self.values[reader]:
                self._read_from.setdefault(value, []).append(reader)

    def _read_by(self, source: fx.Node) -> Iterable[fx.Node]:
        return self.values[source] if self.passes(source) else (source,)

    def passes(self, node: fx.Node) -> bool:
        """Whether it is nothing in memory of its own."""
        return node in self.inlined or is_view(node)

    def _is_written(self, node: fx.Node) -> bool:
        readers = list(_readers(node))
        is_large = len(readers) > 1 and len(self.values[node]) > MOST_READS
        return is_large or _is_sum(node) or not all(map(is_generated, readers))

    def _add(self, node: fx.Node) -> None:
        """To the kernel that reads most of what it reads, or alone."""
        joins = self._best(node) if is_generated(node) else None
        unit = joins if joins is not None else []
        unit.append(node)
        self._unit[node] = unit

    def _best(self, node: fx.Node) -> list[fx.Node] | None:
        scores = ((self._shared(unit, node), unit) for unit in self.all() if is_generated(unit[0]))
        found = sorted((pair for pair in scores if pair[0]), key=lambda pair: -pair[0])
        return next((unit for _, unit in found if not self._is_between(unit, node)), None)

    def _shared(self, unit: list[fx.Node], node: fx.Node) -> int:
        """Elements of what both read, or one writes and the other reads."""
        if _elements(unit[0]) != _elements(node):
            return 0
        known = {*unit, *(value for one in unit for value in self.values[one])}
        shared = known & self.values[node]
        return sum(one.meta["val"].numel() for one in shared if "val" in one.meta)

    def _is_between(self, unit: list[fx.Node], node: fx.Node) -> bool:
        """Whether something else must run after the unit and before the node."""
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
        """Every unit, by its first node."""
        return list({id(unit): unit for unit in self._unit.values()}.values())

    def in_order(self) -> list[list[fx.Node]]:
        """As they run: whatever a unit reads comes before it."""
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

    def stays_inside(self, node: fx.Node) -> bool:
        """Whether it is never written: computed again, or read by its own kernel alone."""
        if not is_generated(node):
            return False
        unit = self._unit.get(node)
        return all(self._unit[reader] is unit for reader in self._read_from.get(node, ()))


class _Kernel:
    """Makes what a kernel writes, and tells a dispatch mode of it."""

    def __init__(self, unit: list[fx.Node], units: Units) -> None:
        read = {value for node in unit for value in units.values[node]} - {*unit}
        self._read = [node for node in sorted(read) if _is_tensor(node)]
        self._written = [node for node in unit if not units.stays_inside(node)]
        self._unpacks = any(writes_4bit_out(node.target) for node in self._written)
        self._make = list(map(_New, self._written))

    def __call__(self, env: Env) -> None:
        made = [make() for make in self._make]
        env.update(zip(self._written, made, strict=True))
        KERNEL([env[node] for node in self._read], made, self._unpacks)


class _Operator:
    """Runs one node of the graph."""

    def __init__(self, node: fx.Node) -> None:
        self._node, self._target = node, cast("Callable[..., Any]", node.target)

    def __call__(self, env: Env) -> None:
        args, kwargs = fx.map_arg((self._node.args, self._node.kwargs), env.__getitem__)
        env[self._node] = self._target(*args, **kwargs)


class Kernels:
    """Runs a graph on `meta` as its kernels would; a dispatch mode is told of them by `KERNEL`."""

    def __init__(self, module: fx.GraphModule) -> None:
        units = Units(module.graph)
        nodes = list(module.graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._constants = {n: getattr(module, n.target) for n in nodes if n.op == "get_attr"}
        self._output = nodes[-1].args
        self._steps = list(_steps(units))

    def __call__(self, values: list[Any]) -> Any:
        """Take the inputs out of a list, so that what backward needs no more is freed."""
        env: Env = {**self._constants, **dict(zip(self._inputs, values, strict=True))}
        values.clear()
        for run, done_with in self._steps:
            run(env)
            for node in done_with:
                del env[node]
        return fx.map_arg(self._output, env.__getitem__)[0]


def _steps(units: Units) -> Iterator[tuple[Callable[[Env], None], list[fx.Node]]]:
    """What to run, each with what nobody reads after it."""
    parts = [part for unit in units.in_order() for part in _parts(unit, units)]
    last = {node: number for number, (_, read) in enumerate(parts) for node in read}
    done_with: dict[int, list[fx.Node]] = {}
    for node, number in last.items():
        done_with.setdefault(number, []).append(node)
    for number, (run, _) in enumerate(parts):
        if run is not None:
            yield run, done_with.get(number, [])


def _parts(
    unit: list[fx.Node], units: Units
) -> Iterator[tuple[Callable[[Env], None] | None, list[fx.Node]]]:
    """A unit with the views that it reads; None for what is there, and for what is asked for."""
    if is_generated(unit[0]):
        read = {value for node in unit for value in units.values[node]} - {*unit}
        yield _Kernel(unit, units), sorted(read)  # in order, so that traces are freed alike
        return
    views = _views(unit[0], units)
    yield from ((_Operator(view), view.all_input_nodes) for view in views)
    is_call = unit[0].op == "call_function"
    yield _Operator(unit[0]) if is_call else None, [*views, *unit[0].all_input_nodes]


def _views(node: fx.Node, units: Units) -> list[fx.Node]:
    """Views that a node reads, the innermost first."""
    found = dict[fx.Node, None]()
    for source in node.all_input_nodes:
        if units.passes(source):
            found |= dict.fromkeys([*_views(source, units), source])
    return list(found)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


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
    with uncounted():
        rewrite(module.graph)
    kernels = Kernels(module)
    _compiled.num_graphs += 1

    def run(args: list[Any]) -> Any:
        return kernels(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def make_backend(compile_graph: Callable[..., Any]) -> Any:
    """A backend for `torch.compile` that splits and decomposes graphs as inductor does.

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
