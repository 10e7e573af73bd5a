"""The one door to torch's private modules: inductor, Dynamo and the partitioner.

A pass over the graphs that inductor writes, and code of our own for an operator, have no public
interface (torch 2.13). This file ends where they get one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import config as dynamo
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as partitioner
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, register_lowering, view
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.virtualized import V, ops
from torch._subclasses import FakeTensorMode
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

__all__ = [
    "FloorDiv", "ModularIndexing", "V", "aot_autograd", "fallback_handler", "ir",
    "maybe_mark_dynamic", "min_cut_rematerialization_partition", "ops", "register_lowering",
    "select_decomp_table", "stable_topological_sort", "view",
]  # fmt: skip


def allow_recompute(*, elementwise: bool) -> None:
    """Let compiled layers compute norms and activations again in backward, or keep them."""
    if partitioner.ban_recompute_materialized_backward == elementwise:
        torch.compiler.reset()  # compiled code does not remember this setting
    partitioner.ban_recompute_materialized_backward = not elementwise
    dynamo.recompile_limit = max(dynamo.recompile_limit, 16)  # kinds of layers share a forward


def fake_result(target: Callable[..., Any], args: Any) -> Any:
    """Return an operator's result without data, from arguments without data."""
    with cast("FakeTensorMode", detect_fake_mode(args)):
        return target(*args)


class _Pass(CustomGraphPass):
    def __init__(self, rewrite: Callable[[fx.Graph], None]) -> None:
        self._rewrite = rewrite

    def __call__(self, graph: fx.Graph) -> None:
        self._rewrite(graph)

    def uuid(self) -> bytes:
        """Tell the compiler's cache of another version of this folder."""
        return get_hash_for_files(tuple(sorted(map(str, Path(__file__).parent.glob("*.py")))))


def compile_graph(module: fx.GraphModule, inputs: Any, rewrite: Callable[[fx.Graph], None]) -> Any:
    """Compile a layer's graph with inductor.

    Args:
        module: The graph.
        inputs: Examples of its inputs.
        rewrite: Changes the graphs of forward and of backward before their kernels are written.
    """
    from torch._inductor.compile_fx import compile_fx  # takes a second, and only here

    patches = {"post_grad_custom_post_pass": _Pass(rewrite), "reorder_for_peak_memory": False}
    return compile_fx(module, inputs, config_patches=patches)


def lower_in_place(operator: Any, without_result: Any) -> None:
    """Let compiled code write an operator's result over its first argument.

    Args:
        operator: Returns its first argument.
        without_result: The same, returning nothing: a result would keep the matrix while the code
            runs, and the compiler's own code would copy the matrix first.
    """

    def generate(first: Any, *others: Any) -> Any:
        ir.FallbackKernel.create(without_result, first, *others)
        return first

    register_lowering(operator, type_promotion_kind=None)(generate)
