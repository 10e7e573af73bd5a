"""Compiled layers on `meta`: the compiler's own choice of what is kept, and what its kernels hold.

The partitioner that torch.compile uses splits forward and backward. Then the graphs are run
operator by operator, in the order in which kernels would run, and of the elementwise ones only
those results are counted that a kernel writes (`strixft.plan.kernels`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from strixft.plan.kernels import Kernels
from strixft.step import layers
from strixft.step.products import rewrite
from strixft.step.tracker import uncounted


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


def _compile(module: fx.GraphModule, _: Any, *, joined: bool) -> Callable[..., Any]:
    with uncounted():
        rewrite(module.graph, joined=joined)
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


_backends = {joined: make_backend(partial(_compile, joined=joined)) for joined in (False, True)}


def _planned(*, joined: bool) -> Any:
    return _backends[joined]


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
    before, layers.BACKEND = layers.BACKEND, _planned
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
