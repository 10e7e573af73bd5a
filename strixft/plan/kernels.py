"""Which kernels a graph becomes, in which order they run, and which results they write.

As inductor does it (torch 2.11 and 2.13: `ir.StorageBox.should_realize_on_reuse`,
`Scheduler.fuse_nodes`). An elementwise result that only generated code reads is computed again
wherever it is read. One that a product, an attention or the caller reads is written, by a kernel
that writes whatever runs over as many elements and reads the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from strixft.step.tracker import uncounted

torch.library.define("strixft::kernel", "(Tensor[] read, Tensor[] written) -> ()")
KERNEL = torch.ops.strixft.kernel.default
"""Tells a dispatch mode that a kernel has run, and what it has read and written."""


@torch.library.impl("strixft::kernel", "CompositeExplicitAutograd")
def _kernel(read: list[torch.Tensor], written: list[torch.Tensor]) -> None:
    pass


MOST_READS = 4
"""A result made of more tensors than this is written if it is used twice, whoever uses it."""


def _is_view(node: fx.Node) -> bool:
    target: Any = node.target
    is_view = getattr(target, "is_view", False) or "view" in str(target)
    return node.op == "call_function" and is_view


def _is_generated(node: fx.Node) -> bool:
    """Whether the compiler writes the kernel: elementwise, or a sum along a row."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    fusible = torch.Tag.pointwise in tags or torch.Tag.reduction in tags
    return fusible and not _is_view(node)


def _is_sum(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _elements(node: fx.Node) -> int:
    """Elements that a kernel runs over: the largest of what it reads and writes."""
    values = (source.meta.get("val") for source in (node, *node.all_input_nodes))
    return max((value.numel() for value in values if isinstance(value, torch.Tensor)), default=0)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a result, views looked through."""
    for user in node.users:
        yield from _readers(user) if _is_view(user) else (user,)


class Units:
    """What runs as one: a kernel with the results that it writes, or any other operator."""

    def __init__(self, graph: fx.Graph) -> None:
        self.values: dict[fx.Node, set[fx.Node]] = {}
        """What each node reads from memory: views and what is computed again looked through."""
        self.inlined: set[fx.Node] = set()
        self._unit: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.values[node] = {v for n in node.all_input_nodes for v in self._read_by(n)}
            if _is_generated(node) and not self._is_written(node):
                self.inlined.add(node)
            elif not _is_view(node):
                self._add(node)

    def _read_by(self, source: fx.Node) -> Iterable[fx.Node]:
        return self.values[source] if self.passes(source) else (source,)

    def passes(self, node: fx.Node) -> bool:
        """Whether it is nothing in memory of its own."""
        return node in self.inlined or _is_view(node)

    def _is_written(self, node: fx.Node) -> bool:
        readers = list(_readers(node))
        is_large = len(readers) > 1 and len(self.values[node]) > MOST_READS
        return is_large or _is_sum(node) or not all(map(_is_generated, readers))

    def _add(self, node: fx.Node) -> None:
        """To the kernel that reads most of what it reads, or alone."""
        joins = self._best(node) if _is_generated(node) else None
        unit = joins if joins is not None else []
        unit.append(node)
        self._unit[node] = unit

    def _best(self, node: fx.Node) -> list[fx.Node] | None:
        scores = ((self._shared(unit, node), unit) for unit in self.all() if _is_generated(unit[0]))
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
        if not _is_generated(node):
            return False
        return node in self.inlined or all(
            self.passes(reader) or self._unit[reader] is self._unit[node]
            for reader in _readers(node)
        )


class Kernels(fx.Interpreter):
    """Runs a graph as its kernels would; a dispatch mode is told of them by `KERNEL`."""

    def __init__(self, module: fx.GraphModule) -> None:
        units = Units(module.graph)
        self._generated = set(filter(_is_generated, module.graph.nodes))
        self._kernels = {unit[-1]: unit for unit in units.all() if unit[-1] in self._generated}
        self._units = units
        order = units.in_order()
        _reorder(order, units)
        super().__init__(module)
        self.user_to_last_uses = _last_uses(order, units)

    def run_node(self, node: fx.Node) -> Any:
        """Results of generated code count when their kernel has run."""
        if node not in self._generated:
            return super().run_node(node)
        with uncounted():
            self.env[node] = super().run_node(node)
        if node in self._kernels:
            self._tell(self._kernels[node])
        return self.env[node]

    def _tell(self, unit: list[fx.Node]) -> None:
        read = {value for node in unit for value in self._units.values[node]} - {*unit}
        written = [node for node in unit if not self._units.stays_inside(node)]
        KERNEL(self._tensors(sorted(read)), self._tensors(written))

    def _tensors(self, nodes: Iterable[fx.Node]) -> list[torch.Tensor]:
        values = (self.env[node] for node in nodes)
        return [value for value in values if isinstance(value, torch.Tensor)]


def _reorder(order: list[list[fx.Node]], units: Units) -> None:
    placed = dict.fromkeys(node for unit in order for node in _with_passed(unit, units))
    for before, after in itertools.pairwise(placed):
        before.append(after)


def _last_uses(order: list[list[fx.Node]], units: Units) -> dict[fx.Node, list[fx.Node]]:
    """After the last node of a unit goes what no later unit reads."""
    last = {
        node: unit[-1] for unit in order for node in _with_passed(unit, units) if node not in unit
    }
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        found.setdefault(user, []).append(node)
    return found


def _with_passed(unit: list[fx.Node], units: Units) -> list[fx.Node]:
    """A unit's nodes with all that they read, sources first."""
    found = dict[fx.Node, None]()

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if units.passes(source):
                visit(source)
            found[source] = None
        found[node] = None

    for node in unit:
        visit(node)
    return list(found)
