"""The variants `base` and `tuned` of a model, loaded one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from strixft.attention.interface import use_backend
from strixft.catalog.methods import METHODS
from strixft.guard.host import device_type, training_dtype, training_host
from strixft.model.adapter import base_of, load_adapter
from strixft.model.architecture import architecture_of
from strixft.model.kernels import switch_off
from strixft.model.load import load_base
from strixft.probe.checks import choose_attention, find_bad_kernels, usable
from strixft.recipe.schema import Recipe

VARIANTS = ("base", "tuned")


def load_variant(recipe: Recipe, adapter: Path, variant: str, *, merged: bool = True) -> nn.Module:
    """Load base or tuned in evaluation mode; see `load_variants`."""
    wanted = VARIANTS[: VARIANTS.index(variant) + 1]
    *_, (_, model) = load_variants(recipe, adapter, wanted, merged=merged)
    return model


def load_variants(
    recipe: Recipe, folder: Path, variants: Sequence[str] = VARIANTS, *, merged: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield base, then tuned, each with its name.

    If all weights were trained, the base is given up before the tuned model is loaded; the caller
    should give it up too.

    Args:
        recipe: The recipe that was trained.
        folder: The trained adapter or weights.
        variants: `base`, or both.
        merged: Merge the adapter where that rounds too little to tell, which saves a third of the
            work; the base is then only there before.

    Raises:
        HostError: No attention backend is correct on this machine.
    """
    device, dtype = device_type(), training_dtype()
    model = load_base(recipe, device, dtype)
    heads = architecture_of(model.config).heads
    backend = usable(choose_attention(heads, training_host(), packing=False))[0]  # correct here
    switch_off(find_bad_kernels(model.config, training_host()))

    def ready(model: nn.Module) -> nn.Module:
        use_backend(base_of(model), backend)
        return model.eval()

    yield "base", ready(model)
    if "tuned" not in variants:
        return
    if METHODS[recipe.method].adapter == "none":
        del model
        gc.collect()
        model = load_base(recipe.model_copy(update={"model": str(folder)}), device, dtype)
    else:
        model = load_adapter(model, folder)
        if merged and dtype is torch.float32 and METHODS[recipe.method].base == "native":
            model.merge_adapter()  # type: ignore[operator]
    yield "tuned", ready(model)
