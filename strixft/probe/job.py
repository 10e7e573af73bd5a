"""A job: recipe, model, host and step options, described once for planning and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from strixft.attention.backends import Heads, known_backends
from strixft.catalog.hosts import Host
from strixft.catalog.methods import METHODS, Method
from strixft.model.architecture import Architecture, architecture_of
from strixft.model.load import native_dtype
from strixft.probe.checks import USABLE, Verdict, require_device_works, usable
from strixft.recipe.schema import Recipe
from strixft.step.update import StepOptions
from strixft.support.errors import HostError, RecipeError


@dataclass(frozen=True)
class Job:
    """A recipe's training of one model on one host."""

    recipe: Recipe
    config: Any
    """The model's configuration, as its checkpoint has it."""
    host: Host
    options: StepOptions
    """Options of the step; a plan chooses how many layers are recomputed."""
    verdicts: tuple[Verdict, ...] = ()
    """Attention backends that were tried on this machine; empty for another one."""

    @classmethod
    def of(cls, recipe: Recipe, config: Any, host: Host) -> Job:
        """Choose the step options of a recipe on a host; on this machine, by what runs there.

        Raises:
            RecipeError: The attention that the recipe names cannot be used there.
            HostError: No attention is right on this machine, or 4-bit weights are wrong.
        """
        verdicts: tuple[Verdict, ...] = ()
        heads, asked = architecture_of(config).heads, recipe.train.attention
        if host.here:
            method, packing = METHODS[recipe.method], recipe.dataset.packing
            verdicts = tuple(require_device_works(heads, method, host, asked, packing=packing))
        options = _choose_options(recipe, heads, host, verdicts)
        return cls(recipe, config, host, options, verdicts)

    @classmethod
    def planned(
        cls, recipe: Recipe, config: Any, host: Host, choice: Mapping[str, Any], plan_again: str
    ) -> Job:
        """Take the step options that a plan chose, once this machine has tried them.

        The plan may have been made for another machine, or before a driver was changed.

        Args:
            recipe: The recipe that was planned.
            config: The model's configuration.
            host: This machine.
            choice: The plan's choice.
            plan_again: The command that makes another plan.

        Raises:
            HostError: The attention of the plan, or 4-bit weights, are wrong here.
        """
        heads, method = architecture_of(config).heads, METHODS[recipe.method]
        verdicts = require_device_works(heads, method, host, choice["attention"])
        for verdict in verdicts:
            if verdict.outcome not in USABLE:
                raise HostError(
                    f"attention {verdict.backend.name!r}, which the plan chose, cannot be used on"
                    f" {host.name}: {verdict.reason}",
                    fix=plan_again,
                )
        options = StepOptions(**{field.name: choice[field.name] for field in fields(StepOptions)})
        return cls(recipe, config, host, options, tuple(verdicts))

    def with_recipe(self, recipe: Recipe) -> Job:
        """Return the job of a changed recipe, for the same model on the same host."""
        options = _choose_options(recipe, self.architecture.heads, self.host, self.verdicts)
        return replace(self, recipe=recipe, options=options)

    def options_with(self, recomputed_layers: int) -> StepOptions:
        """Return the step options where so many layers are recomputed."""
        return replace(self.options, recomputed_layers=recomputed_layers)

    @property
    def method(self) -> Method:
        """The recipe's row of `METHODS`."""
        return METHODS[self.recipe.method]

    @cached_property
    def architecture(self) -> Architecture:
        """The model's layers, its heads, and what else its code tells."""
        return architecture_of(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that the host computes in."""
        return native_dtype(self.host.device, bfloat16=self.host.bfloat16)


def _choose_options(
    recipe: Recipe, heads: Heads, host: Host, verdicts: tuple[Verdict, ...]
) -> StepOptions:
    """Choose the fastest attention that nothing speaks against, or the one the recipe names."""
    train, packing = recipe.train, recipe.dataset.packing
    found = (
        usable(verdicts)
        if host.here
        else known_backends(heads, host.device, host.architecture, packing=packing)
    )
    if train.attention != "auto":
        found = [backend for backend in found if backend.name == train.attention]
    if not found:
        reasons = "".join(f": {verdict.reason}" for verdict in verdicts)
        raise RecipeError(
            f"attention {train.attention!r} cannot train {heads.model_type} on {host.name}"
            f"{reasons}",
            fix="--set train.attention=auto",
            settings={"train.attention": "auto"},
        )
    on_gpu, one_length = host.device == "cuda", found[0].packed  # other lengths compile anew
    compiled = on_gpu and one_length if train.compile == "auto" else train.compile == "layers"
    return StepOptions(
        attention=found[0].name,
        compiled=compiled,
        elementwise=(compiled and train.recompute != "none") or train.recompute == "elementwise",
    )
