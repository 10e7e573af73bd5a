"""Private names of torch, each with its cause and its end.

Nothing else in strixft uses a private name of torch (`tests/test_private_names.py`), but
`step/compiler.py` and `step/lowering.py`, the doors to its compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Modes that see every operator: torch's documentation of `__torch_dispatch__` gives this path.
# End: when the class has a public one.
from torch.utils._python_dispatch import TorchDispatchMode

# Nested lists, tuples and mappings of tensors.
# End: when the oldest torch that strixft takes has a public `pytree`.
from torch.utils._pytree import tree_iter, tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_iter", "tree_leaves", "tree_map"]


def storage_key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage; views share it."""
    # torch has no public identity of a storage, and `meta` has no address.
    # End: when `UntypedStorage` can be hashed by what it refers to.
    key: int = tensor.untyped_storage()._cdata
    return key


def schema_of(operator: Any) -> Any:
    """Return the schema of an overload of an operator: what it returns, and what it writes to."""
    # Operators tell in no public way whether their results are new.
    # End: when `OpOverload` has a public schema.
    return operator._schema


def call_of(layer: Any) -> Callable[..., Any]:
    """Return the function that runs a module, compiled where `layer.compile()` was called."""
    # Hooks would be compiled with the layer, so code around compiled code has to replace the call.
    # End: when a module takes hooks that `Module.compile` leaves outside.
    call: Callable[..., Any] = layer._compiled_call_impl or layer._call_impl
    return call


def set_call(layer: Any, call: Callable[..., Any]) -> None:
    """Let a module be run by a function."""
    # Cause as of `call_of`.
    # End: with it.
    layer._compiled_call_impl = call


def boxed(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a function that runs a compiled graph and frees its arguments, given as a list."""

    # torch gives a list only to a function with this mark, so that each is freed after its last
    # use.
    # End: when `torch.compile` documents how a backend asks for a list.
    def call(args: list[Any]) -> Any:
        return run(args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


CHECK_OF_FUSED_ADAM = "_device_dtype_check_for_fused"
# Name in `torch.optim.adam`: torch does not list `meta`, where a plan runs, for the fused one.
# End: when it does.


@contextlib.contextmanager
def gradients_inside() -> Iterator[None]:
    """Record gradients inside an operator of our own, where torch has turned recording off."""
    # An operator's Python is called below autograd, and `torch.enable_grad` does not reach there.
    # End: when it does.
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    kept = torch._C._dispatch_tls_local_exclude_set() - excluded
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, kept), torch.enable_grad():
        yield
