"""Tokens that reach each expert, counted while a model runs.

Shapes: N tokens, K experts of a token, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Counts:
    """Tokens of each expert, (E,), by the names of the modules.

    Args:
        modules: Modules of experts, by their names.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._names = {id(part): path for path, part in modules.items()}
        self._tokens: dict[str, Tensor] = {}
        self._real: Tensor | None = None

    @contextlib.contextmanager
    def among(self, real: Tensor) -> Iterator[None]:
        """Count in this block the choices of real tokens only.

        Args:
            real: Whether a token is no padding, (B, T).
        """
        self._real = real.flatten()
        try:
            yield
        finally:
            self._real = None

    def note(self, experts: Any, index: Tensor) -> None:
        """Count the choices of a module's tokens, (N, K)."""
        name = self._names.get(id(experts))
        if name is None:
            return
        chosen = index if self._real is None else index[self._real]
        found = torch.bincount(chosen.flatten(), minlength=experts.num_experts)
        self._tokens[name] = self._tokens.get(name, torch.zeros_like(found)) + found

    def shares(self) -> dict[str, list[float]]:
        """Return the share of the choices that fell on each expert, by module."""
        return {name: (one / one.sum()).tolist() for name, one in self._tokens.items()}


watch: Counts | None = None
"""The counts that are taken now."""


@contextlib.contextmanager
def counting(modules: Mapping[str, nn.Module]) -> Iterator[Counts]:
    """Count the tokens of experts, modules by name, in this block."""
    global watch
    before, watch = watch, Counts(modules)
    try:
        yield watch
    finally:
        watch = before
