"""Memory and work inside an operator of our own, which a tracker sees as one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strixft.model.delta_rule import INSIDE
from strixft.plan.cost import Cost, Layout, layout_of, made_of, operator_cost
from strixft.step.memory_tracker import MemoryTracker
from strixft.support.private_torch import tree_iter


@dataclass(frozen=True, slots=True)
class Inside:
    """An operator's program."""

    peak_bytes: int
    """Most that it holds beside its arguments and its result."""
    cost: Cost


class _Watched(MemoryTracker):
    """Adds up the work of all operators of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.moved = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(func, args, kwargs)
        cost = operator_cost(func, args, kwargs, result)
        self.flop += cost.flop
        self.moved += sum(cost.moved)
        return result


_seen: dict[tuple[Any, tuple[Layout, ...], Any], Inside] = {}


def look_inside(func: Any, args: Any) -> Inside:
    """Run an operator's program on `meta`, once for each shape of its arguments.

    Args:
        func: A key of `INSIDE`.
        args: Its arguments: tensors, then whatever else it takes.
    """
    tensors = [one for one in args if isinstance(one, Tensor)]
    rest = tuple(args[len(tensors) :])
    key = func, tuple(map(layout_of, tensors)), rest
    if key not in _seen:
        _seen[key] = _look(func, made_of(key[1]), rest)
    return _seen[key]


@torch.no_grad()
def _look(func: Any, tensors: list[Tensor], rest: tuple[Any, ...]) -> Inside:
    watched = _Watched()
    for one in tensors:
        watched.watch(one, "weights")
    before = watched.live_bytes
    with watched:
        result = INSIDE[func](*tensors, *rest)
    given = sum(one.untyped_storage().nbytes() for one in tree_iter(result))
    peak = max(0, watched.peak_bytes - before - given)
    return Inside(peak, Cost(watched.flop, (watched.moved,), "float32"))
