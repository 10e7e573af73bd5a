"""How a step is computed on a host: which attention, and whether layers are compiled."""

from __future__ import annotations

from typing import Any

from strixft.attention import Heads, ladder
from strixft.errors import RecipeError
from strixft.hardware import Host
from strixft.recipe import Recipe
from strixft.step import Ways


def ways_for(recipe: Recipe, config: Any, host: Host, *, recomputed_layers: int = 0) -> Ways:
    """The fastest way that nothing speaks against, or the one the recipe names.

    Args:
        recipe: May name the attention, and whether to compile.
        config: The model's configuration.
        host: Where it runs.
        recomputed_layers: Layers whose activations are not kept.

    Raises:
        RecipeError: The attention that it names is no choice there.
    """
    train, on_gpu = recipe.train, host.device == "cuda"
    heads = Heads.of(config)
    found = ladder(heads, host.device, host.architecture, packing=recipe.dataset.packing)
    if train.attention != "auto":
        found = [rung for rung in found if rung.name == train.attention]
    if not found:
        raise RecipeError(
            f"attention {train.attention!r} cannot train {heads.model_type} on {host.name}",
            fix="--set train.attention=auto",
        )
    compiled = on_gpu if train.compile == "auto" else train.compile == "layers"
    return Ways(
        attention=found[0].name,
        compiled=compiled,
        recomputed_layers=recomputed_layers,
        elementwise=(compiled and train.recompute != "none") or train.recompute == "elementwise",
    )
