"""Results of operators on `meta`, kept by their shapes.

A trace runs the same few operators for each layer and micro-batch, and torch takes 0.1 to 0.4 ms to
find the shape of one result. Only operators that give new tensors are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from strixft.plan.cost import Cost, operator_cost
from strixft.support.private_torch import schema_of

aten = torch.ops.aten

_ALWAYS_RUN = {
    aten.embedding_dense_backward.default,  # the tracker wants to know its result
    aten._unsafe_view.default,  # its schema does not say that it gives a view
}

MOST = 50_000
"""Operators kept; a trace has a few hundred that differ."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _layouts(func: Any, results: tuple[Any, ...]) -> tuple[Layout, ...] | None:
    """Return the layouts of results of any shapes; None where the operator has to run."""
    schema = schema_of(func)
    are_new = func not in _ALWAYS_RUN and all(
        argument.alias_info is None for argument in (*schema.arguments, *schema.returns)
    )
    are_meta = all(isinstance(value, Tensor) and value.is_meta for value in results)
    return tuple(map(_layout, results)) if are_new and are_meta else None


class OpCache:
    """Layouts of results, and costs, by operator and shapes of its arguments."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[tuple[Layout, ...] | None, Cost]] = {}

    def run(
        self, func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]
    ) -> tuple[Any, Cost]:
        """Return an operator's result and cost.

        Args:
            func: An overload of an operator.
            args: Its arguments, tensors of any shapes among them.
            kwargs: Its named arguments.
            run: Runs it.
        """
        key = func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
        layouts, cost = self._known.get(key, (None, None))
        if layouts is not None and cost is not None:
            made = tuple(
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, dtype in layouts
            )
            return (made if len(schema_of(func).returns) > 1 else made[0]), cost
        result = run(func, args, kwargs)
        if cost is None:
            if len(self._known) >= MOST:
                self._known.clear()
            cost = operator_cost(func, args, kwargs, result)
            results = result if isinstance(result, tuple) else (result,)
            self._known[key] = _layouts(func, results), cost
        return result, cost


SHARED = OpCache()
"""Kept for every trace of this process: results depend on operator and shapes alone."""
