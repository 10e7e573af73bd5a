"""A job: recipe, model, host and step options, described once for planning and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch

from strixft.attention.backends import CARRIES_ON, Heads, known_backends
from strixft.catalog.hosts import Host
from strixft.catalog.methods import METHODS, Method
from strixft.catalog.target_kernels import failing_kernels
from strixft.model.architecture import Architecture, architecture_of
from strixft.model.load import native_dtype
from strixft.model.targets import adapted_layers
from strixft.probe.checks import (
    USABLE,
    LayersProof,
    Verdict,
    heads_here,
    prove_layers,
    require_device_works,
    usable,
)
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
    proof: LayersProof = field(default_factory=LayersProof)
    """Faults that the model's layers showed on this machine."""

    @classmethod
    def of(cls, recipe: Recipe, config: Any, host: Host) -> Job:
        """Choose the step options of a recipe on a host; on this machine, by what runs there.

        Raises:
            RecipeError: The attention that the recipe names cannot be used there.
            HostError: No attention is right on this machine, or 4-bit weights are wrong.
        """
        if not host.here:
            options = _choose_options(recipe, architecture_of(config).heads, host)
            return cls(recipe, config, host, options)
        heads, asked = heads_here(config), recipe.train.attention
        method, packing = METHODS[recipe.method], recipe.dataset.packing
        verdicts = tuple(require_device_works(heads, method, host, asked, packing=packing))
        proof = prove_layers(config, host, usable(verdicts))
        options = _choose_options(recipe, heads, host, verdicts, proof)
        return cls(recipe, config, host, options, verdicts, proof)

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
        heads, method = heads_here(config), METHODS[recipe.method]
        verdicts = require_device_works(heads, method, host, choice["attention"])
        proof = prove_layers(config, host, usable(verdicts))
        for verdict in verdicts:
            reason = proof.leaks.get(verdict.backend.name)
            if verdict.outcome not in USABLE or reason:
                raise HostError(
                    f"attention {verdict.backend.name!r}, which the plan chose, cannot be used on"
                    f" {host.name}: {reason or verdict.reason}",
                    fix=plan_again,
                )
        options = StepOptions(**{field.name: choice[field.name] for field in fields(StepOptions)})
        return cls(recipe, config, host, options, tuple(verdicts), proof)

    def with_recipe(self, recipe: Recipe) -> Job:
        """Return the job of a changed recipe, for the same model on the same host."""
        heads = heads_here(self.config) if self.host.here else self.architecture.heads
        options = _choose_options(recipe, heads, self.host, self.verdicts, self.proof)
        return replace(self, recipe=recipe, options=options)

    def options_with(self, recomputed_layers: int) -> StepOptions:
        """Return the step options where so many layers are recomputed."""
        return replace(self.options, recomputed_layers=recomputed_layers)

    @property
    def method(self) -> Method:
        """The recipe's row of `METHODS`."""
        return METHODS[self.recipe.method]

    @property
    def unpacked_because(self) -> str | None:
        """The reason why documents do not share rows; None where they do, or should not."""
        chosen, heads = self.options.backend, self.architecture.heads
        if chosen.packed or not self.recipe.dataset.packing:
            return None
        if self.recipe.train.attention == chosen.name:
            return f"train.attention: {chosen.name} takes one document a row"
        if self.proof.leaks:
            return f"tried on {self.host.name}: {next(iter(self.proof.leaks.values()))}"
        if heads.carries_state:
            return CARRIES_ON
        return "no attention that keeps documents apart can be used"

    @cached_property
    def architecture(self) -> Architecture:
        """The model's layers, its heads, and what else its code tells."""
        return architecture_of(self.config)

    @cached_property
    def kinds(self) -> list[tuple[int, bool, int]]:
        """For each layer its kind in the model, whether it gets an adapter, and its place.

        No gradient goes below the first adapter (-1), and none to the input of its layer (0).
        """
        known = self.architecture.kinds
        adapted = list(range(len(known)))
        if self.method.adapter != "none":
            adapted = adapted_layers(self.recipe.lora, len(known))
        places = [max(-1, min(layer - adapted[0], 1)) for layer in range(len(known))]
        return [(known[n], n in adapted, places[n]) for n in range(len(known))]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that the host computes in."""
        return native_dtype(self.host.device, bfloat16=self.host.bfloat16)


def _choose_options(
    recipe: Recipe,
    heads: Heads,
    host: Host,
    verdicts: tuple[Verdict, ...] = (),
    proof: LayersProof | None = None,
) -> StepOptions:
    """Choose the fastest attention that nothing speaks against, or the one the recipe names."""
    train, packing = recipe.train, recipe.dataset.packing
    found = (
        usable(verdicts)
        if host.here
        else known_backends(heads, host.device, host.architecture, packing=packing)
    )
    leaks = proof.leaks if proof else {}
    found = [backend for backend in found if backend.name not in leaks]
    if train.attention != "auto":
        found = [backend for backend in found if backend.name == train.attention]
    if not found:
        reasons = "".join(
            f": {leaks.get(verdict.backend.name, verdict.reason)}" for verdict in verdicts
        )
        raise RecipeError(
            f"attention {train.attention!r} cannot train {heads.model_type} on {host.name}"
            f"{reasons}",
            fix="--set train.attention=auto",
            settings={"train.attention": "auto"},
        )
    can_compile = (
        host.device == "cuda"
        and found[0].packed  # other lengths compile anew
        and failing_kernels(recipe.model, host.architecture) is None
    )
    compiled = can_compile if train.compile == "auto" else train.compile == "layers"
    return StepOptions(
        attention=found[0].name,
        compiled=compiled,
        elementwise=(compiled and train.recompute != "none") or train.recompute == "elementwise",
    )
