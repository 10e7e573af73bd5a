"""A job: recipe, model, host and step options, described once for planning and training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from strixft.catalog.hosts import Host
from strixft.catalog.methods import METHODS, Method
from strixft.model.architecture import Architecture, architecture_of
from strixft.model.load import native_dtype
from strixft.probe.checks import step_options_for
from strixft.recipe.schema import Recipe
from strixft.step.update import StepOptions


@dataclass(frozen=True)
class Job:
    """A recipe's training of one model on one host."""

    recipe: Recipe
    config: Any
    """The model's configuration, as its checkpoint has it."""
    host: Host
    options: StepOptions
    """How the step is computed; a plan chooses how many layers are recomputed."""

    @classmethod
    def of(cls, recipe: Recipe, config: Any, host: Host) -> Job:
        """Choose the step options of a recipe on a host.

        Raises:
            RecipeError: The attention that the recipe names cannot be used there.
            HostError: No attention is right on this machine.
        """
        return cls(recipe, config, host, step_options_for(recipe, config, host))

    def with_recipe(self, recipe: Recipe) -> Job:
        """Return the job of a changed recipe, for the same model on the same host."""
        return Job.of(recipe, self.config, self.host)

    def options_with(self, recomputed_layers: int) -> StepOptions:
        """Return the step options where so many layers are recomputed."""
        return replace(self.options, recomputed_layers=recomputed_layers)

    @property
    def method(self) -> Method:
        """The recipe's row of `METHODS`."""
        return METHODS[self.recipe.method]

    @cached_property
    def architecture(self) -> Architecture:
        """The model's layers, heads and what else its code tells."""
        return architecture_of(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that the host computes in."""
        return native_dtype(self.host.device, bfloat16=self.host.bfloat16)
