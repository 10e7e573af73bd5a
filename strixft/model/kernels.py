"""Kernels of other packages for recurrence and convolution, which transformers takes by itself.

Where `fla`, `causal_conv1d` or `mamba_ssm` can be imported, transformers calls them in place of its
own path. Here each such function gets a switch. On `meta`, where a plan runs, no kernel can be
called, and its path in torch is planned.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from strixft.support.private_hf import kernel_beside

FUSED = ("mamba_split_conv1d_scan_combined", "mamba_inner_fn")
"""Never called: they are given weights of projections, and read past their adapters."""

_off: set[str] = set()

_PACKAGE = "strixft_kernel"
"""Attribute of a function with a switch: the package of its kernel."""


def switch_off(packages: Collection[str]) -> None:
    """Let models of this process call kernels of all packages but these."""
    _off.clear()
    _off.update(packages)


def guard_kernels(model: nn.Module) -> tuple[str, ...]:
    """Give the kernels that a model calls a switch; return their packages."""
    found: dict[str, None] = {}
    for module in {type(part).__module__: None for part in model.modules()}:
        names = vars(sys.modules[module])
        for name, function in list(names.items()):
            if beside := kernel_beside(function):
                names[name] = _with_switch(function, *beside)
            if package := getattr(names[name], _PACKAGE, None):
                found[package] = None
    return tuple(found)


def _with_switch(
    own: Callable[..., Any], package: str, kernel: str, plain: Callable[..., Any]
) -> Callable[..., Any]:
    known = frozenset(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def call(first: Tensor, *args: Any, **options: Any) -> Any:
        if kernel in FUSED or package in _off or first.is_meta:
            return plain(first, *args, **{n: v for n, v in options.items() if n in known})
        return own(first, *args, **options)

    setattr(call, _PACKAGE, None if kernel in FUSED else package)
    return call
