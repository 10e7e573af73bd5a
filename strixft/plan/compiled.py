"""Compiled layers on `meta`: the compiler's own choice of what is kept, and what its kernels hold.

The partitioner that torch.compile uses splits forward and backward. Then the graphs are run
operator by operator, and of the elementwise ones only those results are counted that a kernel
writes out: what leaves the graph, and what a product or another operator with a kernel of its own
reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


def _is_fusible(node: fx.Node) -> bool:
    """Whether the generated kernels compute it: elementwise, or a sum along a row."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags or _is_view(node)


def _is_read_outside(node: fx.Node) -> bool:
    """Whether a kernel other than a generated one reads a result, or a view of it."""
    return any(
        not _is_fusible(user) or (_is_view(user) and _is_read_outside(user)) for user in node.users
    )


class _Kernels(fx.Interpreter):
    """Runs a graph as its kernels would, as far as memory is concerned."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._inside = {
            node
            for node in module.graph.nodes
            if _is_fusible(node) and not _is_view(node) and not _is_read_outside(node)
        }

    def run_node(self, node: fx.Node) -> Any:
        if node not in self._inside:
            return super().run_node(node)
        with uncounted():
            return super().run_node(node)


def _compile(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
    kernels = _Kernels(module)

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


@contextlib.contextmanager
def planned_kernels() -> Iterator[None]:
    """Within this block, layers compile to what a plan counts."""
    torch._dynamo.reset()  # the last trace had other shapes
    before = layers.BACKEND
    layers.BACKEND = _backend
    try:
        yield
    finally:
        layers.BACKEND = before
        torch._dynamo.reset()
