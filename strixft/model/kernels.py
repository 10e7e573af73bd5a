"""Recurrence and convolution of layers that carry a state: kernels of packages, and documents.

Where `fla`, `causal_conv1d` or `mamba_ssm` can be imported, transformers calls them in place of its
own path. Here each such function gets a switch. On `meta`, where a plan runs, no kernel can be
called, and its path in torch is planned. The gated delta rule and the convolution before it also
learn to keep the documents of a row apart, which transformers' own path does not.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.activations import ACT2FN

from strixft.model import delta_rule
from strixft.support.private_hf import HubFunction, hub_function

FUSED = ("mamba_split_conv1d_scan_combined", "mamba_inner_fn")
"""Never called: they are given weights of projections, and read past their adapters."""

RULE, CONVOLUTION = "chunk_gated_delta_rule", "causal_conv1d_fn"

STATES = (".A_log", ".dt_bias", ".time_decay")
"""Ends of the names of weights that a recurrence has."""

GROUPED = "grouped_mm"
"""Torch's product of rows with the matrices of their experts; switched off like a package."""

_off: set[str] = set()

_STANDS_FOR = "strixft_stands_for"
"""Attribute of a function that was replaced here: its `HubFunction`."""


def switch_off(packages: Collection[str]) -> None:
    """Let models of this process call kernels of all packages but these."""
    _off.clear()
    _off.update(packages)


def is_on(package: str) -> bool:
    """Return whether kernels of a package may be called."""
    return package not in _off


def guard_kernels(model: nn.Module) -> tuple[str, ...]:
    """Give the kernels that a model calls a switch; return their packages."""
    found: dict[str, None] = {}
    for module in {type(part).__module__: None for part in model.modules()}:
        names = vars(sys.modules[module])
        for name, function in list(names.items()):
            if known := hub_function(function):
                names[name] = _replacement(function, known)
                setattr(names[name], _STANDS_FOR, known)
        for known in _replaced_in(module):
            if known.is_kernel and known.name not in FUSED:
                found[known.package] = None
    return tuple(found)


def _replaced_in(module: str) -> list[HubFunction]:
    functions = (getattr(value, _STANDS_FOR, None) for value in vars(sys.modules[module]).values())
    return [known for known in functions if known is not None]


_takes: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes_documents(decoder: nn.Module) -> bool:
    """Return whether a decoder's layers take the numbers of documents, as `seq_idx`."""
    if decoder not in _takes:
        has_convolution = any(isinstance(part, nn.Conv1d) for part in decoder.modules())
        _takes[decoder] = has_convolution and bool(_replaced_in(type(decoder).__module__))
    return _takes[decoder]


def keeps_documents_apart(layers: nn.Module) -> bool:
    """Return whether all that carries a state in these layers can be told of documents."""
    for module in layers.modules():
        known = {one.name for one in _replaced_in(type(module).__module__)}
        if isinstance(module, nn.Conv1d):
            continue
        own = [f".{name}" for name, _ in module.named_parameters(recurse=False)]
        has_state = any(name.endswith(STATES) for name in own)
        has_convolution = any(isinstance(part, nn.Conv1d) for part in module.children())
        if (has_state and RULE not in known) or (has_convolution and CONVOLUTION not in known):
            return False
    return True


def _replacement(own: Callable[..., Any], known: HubFunction) -> Callable[..., Any]:
    usual = _with_switch(own, known)
    if known.name == RULE:
        return _rule(usual, own, known)
    if known.name == CONVOLUTION:
        return _convolution(usual)
    return usual


def _with_switch(own: Callable[..., Any], known: HubFunction) -> Callable[..., Any]:
    plain, never = known.plain, known.name in FUSED or not known.is_kernel
    parameters = frozenset(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def call(first: Tensor, *args: Any, **options: Any) -> Any:
        if never or known.package in _off or first.is_meta:
            return plain(first, *args, **{n: v for n, v in options.items() if n in parameters})
        return own(first, *args, **options)

    return call


def _rule(
    usual: Callable[..., Any], own: Callable[..., Any], known: HubFunction
) -> Callable[..., Any]:
    """Compute a row from its beginning as one operator; what goes on with a state, as usual."""

    def kernel(*tensors: Tensor, unit: bool) -> Tensor:
        if known.package in _off:
            return delta_rule.chunked(*tensors, unit=unit)
        query, key, value, g, beta = tensors
        g = g.clamp_min(delta_rule.RESET)  # it sums them up, and a larger one rounds those after it
        output: Tensor = own(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=unit)[0]
        return output

    if known.is_kernel:
        delta_rule.kernel[:] = [kernel]

    @functools.wraps(known.plain)
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        use_qk_l2norm_in_kernel: bool = False,
        seq_idx: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if options.get("initial_state") is not None or options.get("output_final_state"):
            options["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
            return usual(query, key, value, g=g, beta=beta, **options)
        unit = use_qk_l2norm_in_kernel
        return delta_rule.gated_delta_rule(query, key, value, g, beta, seq_idx, unit=unit), None

    return call


def _convolution(usual: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(usual)
    def call(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if seq_idx is None:
            return usual(hidden, weight, bias, activation=activation, **options)
        found = delta_rule.short_convolution(hidden, weight, bias, seq_idx).to(hidden.dtype)
        return found if activation is None else ACT2FN[activation](found)

    return call
