"""The door to torch's private modules of Dynamo and the partitioner; `lowering` is inductor's.

They have no public interface (torch 2.13). This file ends where they get one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch._dynamo import config as dynamo
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as partitioner
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode

__all__ = [
    "aot_autograd", "maybe_mark_dynamic", "min_cut_rematerialization_partition",
    "select_decomp_table",
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
