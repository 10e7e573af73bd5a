"""Operators on `meta` that were run before with the same shapes are not run again.

A trace runs the same few operators for each layer and micro-batch, and torch takes 0.1 to 0.4 ms to
find the shape of one result. Only operators that give new tensors are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strixft.plan.cost import Cost, operator_cost

aten = torch.ops.aten

_ALWAYS_RUN = {
    aten.embedding_dense_backward.default,  # the tracker wants to know its result
    aten._unsafe_view.default,  # its schema does not say that it gives a view
}

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class _Known:
    results: tuple[Layout, ...] | None
    """None where the operator has to run."""
    single: bool
    cost: Cost


def _layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _gives_new_tensors(func: Any) -> bool:
    schema = func._schema
    return func not in _ALWAYS_RUN and all(
        argument.alias_info is None for argument in (*schema.arguments, *schema.returns)
    )


def _make(layout: Layout) -> Tensor:
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


class Memo:
    """Results and costs by operator and shapes."""

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def run(
        self, func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]
    ) -> tuple[Any, Cost]:
        """The operator's result and cost.

        Args:
            func: An overload of an operator.
            args: Its arguments.
            kwargs: Its named arguments.
            run: Runs it.
        """
        key = func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
        known = self._known.get(key)
        if known is not None and known.results is not None:
            made = tuple(map(_make, known.results))
            return (made[0] if known.single else made), known.cost
        result = run(func, args, kwargs)
        if known is None:
            known = self._remember(func, args, kwargs, result)
            self._known[key] = known
        return result, known.cost

    @staticmethod
    def _remember(func: Any, args: Any, kwargs: Any, result: Any) -> _Known:
        cost = operator_cost(func, args, kwargs, result)
        given = result if isinstance(result, tuple) else (result,)
        fresh = _gives_new_tensors(func) and all(map(_is_meta, given))
        layouts = tuple(map(_layout, given)) if fresh else None
        return _Known(layouts, not isinstance(result, tuple), cost)
