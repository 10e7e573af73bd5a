"""How a step is computed on a host: which attention, and whether layers are compiled."""

from __future__ import annotations

from typing import Any

from strixft.architecture import architecture_of
from strixft.attention import Heads, Rung, ladder
from strixft.errors import RecipeError
from strixft.hardware import Host
from strixft.methods import METHODS
from strixft.probe.ladder import probe_attention, probed_ladder
from strixft.probe.right import joins_sums
from strixft.recipe import Recipe
from strixft.step import Ways


def _ladder(heads: Heads, host: Host, *, packing: bool) -> list[Rung]:
    """Ways of attention: those that are right on this machine, or by the table of another one."""
    if host.here:
        return probed_ladder(heads, host, packing=packing)
    return ladder(heads, host.device, host.architecture, packing=packing)


def _no_choice(name: str, heads: Heads, host: Host) -> RecipeError:
    verdicts = probe_attention(heads, host) if host.here else []
    reasons = "".join(f": {v.reason}" for v in verdicts if v.rung.name == name)
    return RecipeError(
        f"attention {name!r} cannot train {heads.model_type} on {host.name}{reasons}",
        fix="--set train.attention=auto",
    )


def ways_for(recipe: Recipe, config: Any, host: Host, *, recomputed_layers: int = 0) -> Ways:
    """The fastest way that nothing speaks against, or the one the recipe names.

    Args:
        recipe: May name the attention, and whether to compile.
        config: The model's configuration.
        host: Where it runs.
        recomputed_layers: Layers whose activations are not kept.

    Raises:
        RecipeError: The attention that it names is no choice there.
        HostError: No attention is right on this machine.
    """
    train, on_gpu = recipe.train, host.device == "cuda"
    heads = architecture_of(config).heads
    found = _ladder(heads, host, packing=recipe.dataset.packing)
    if train.attention != "auto":
        found = [rung for rung in found if rung.name == train.attention]
    if not found:
        raise _no_choice(train.attention, heads, host)
    one_length = found[0].packed  # each other length is compiled for itself
    compiled = on_gpu and one_length if train.compile == "auto" else train.compile == "layers"
    return Ways(
        attention=found[0].name,
        compiled=compiled,
        recomputed_layers=recomputed_layers,
        elementwise=(compiled and train.recompute != "none") or train.recompute == "elementwise",
        joined=compiled and joins_sums(METHODS[recipe.method], host),
    )
