"""Layers that get an adapter: linear layers of the text decoder; routers of experts get none."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strixft.model.architecture import text_decoder, text_layers, tower_of
from strixft.model.experts import matrices_of
from strixft.recipe.schema import Lora
from strixft.support.errors import RecipeError
from strixft.support.private_hf import renamed_by_peft
from strixft.support.tables import did_you_mean

ALL_LINEAR = {"lora.target_modules": "all-linear"}
"""The setting that suits every model."""

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Model types whose kernels read the weights of `out_proj` past its adapter.

Source: PEFT 0.21, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Layers that get an adapter, as PEFT takes them."""

    names: list[str]
    """Last parts of the layers' names."""
    parameters: list[str]
    """Experts in one tensor that get an adapter: last parts of its name."""
    exclude: str | None
    """Pattern of layers with such names that get no adapter."""
    left_out: list[str]
    """Sentences about layers that `all-linear` does not adapt."""


def find_targets(base: Any, lora: Lora, idle: Collection[str] = ()) -> Targets:
    """Find the layers that a recipe names.

    Args:
        base: The model.
        lora: The recipe's adapter.
        idle: Last parts of the names of layers that training does not call.

    Raises:
        RecipeError: A name does not belong to any linear layer, or there are no such experts.
    """
    asked, parameters = lora.target_modules, _expert_parameters(base, lora)
    decoder = {id(module) for module in text_decoder(base).modules()}
    inside = [
        path
        for path, module in base.named_modules()
        if id(module) in decoder and is_linear(module) and not is_router(path, base)
    ]
    if isinstance(asked, list):
        _require_adaptable(base, asked, inside, idle)
        return Targets(asked, parameters, _pattern(base, asked, inside), [])
    inside = [path for path in inside if not _is_left_out(path, lora.experts)]
    taken = dict.fromkeys(idle, "training reads its weights past an adapter")
    renamed = renamed_by_peft(getattr(base.config, "model_type", None))
    taken |= dict.fromkeys(renamed, "PEFT takes the name for that of the experts")
    if getattr(base.config, "model_type", None) in _MAMBA:
        taken["out_proj"] = "kernels of Mamba layers read its weights past an adapter"
    names = list(dict.fromkeys(map(leaf, inside)))
    kept = [name for name in names if name not in taken]
    left_out = [f"{name}: {taken[name]}" for name in names if name in taken]
    if lora.experts != "all" and _routes(base):
        left_out.append(f"experts that a router chooses: lora.experts is {lora.experts}")
    return Targets(kept, parameters, _pattern(base, kept, inside), left_out)


def _is_left_out(path: str, experts: str) -> bool:
    """Return whether a linear layer belongs to experts that get no adapter."""
    parts = path.split(".")
    is_shared = any("shared" in part for part in parts)
    return ("experts" in parts and experts != "all") or (is_shared and experts == "none")


def _expert_parameters(base: Any, lora: Lora) -> list[str]:
    """Return the fused tensors of experts that get an adapter, by their names in the layers."""
    if lora.experts != "all":
        return []
    if not _routes(base):
        raise RecipeError(
            "lora.experts: all, and the model has no experts",
            fix="leave lora.experts out",
            settings={"lora.experts": "shared"},
        )
    return list(dict.fromkeys(name for layer in text_layers(base) for name in matrices_of(layer)))


def _routes(base: Any) -> bool:
    """Return whether a model has experts that a router chooses."""
    return any(hasattr(module, "experts") for module in text_decoder(base).modules())


def leaf(path: str) -> str:
    """Return the last part of a module's name."""
    return path.rpartition(".")[2]


def is_named(path: str, names: Collection[str]) -> bool:
    """Return whether one of some names is the last part, or parts, of a path."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix and does nothing else."""
    if type(module).__module__.startswith("transformers.models."):  # routers, for example
        return isinstance(module, nn.Linear) and _returns_product(module)
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _returns_product(module: nn.Linear) -> bool:
    """Return whether a layer of a model's own class returns a product, as Falcon's does.

    Routers return what they chose, grouped layers take other shapes: tried on `meta`.
    """
    shapes = {n: torch.empty_like(w, device="meta") for n, w in module.named_parameters()}
    x = torch.empty(2, module.in_features, device="meta")
    try:
        found = torch.func.functional_call(module, shapes, (x.to(module.weight.dtype),))
    except Exception:  # whatever a class does with other shapes
        return False
    return isinstance(found, torch.Tensor) and found.shape == (2, module.out_features)


def is_router(path: str, base: Any) -> bool:
    """Return whether a layer decides which experts a token goes to."""
    parent, _, name = path.rpartition(".")
    is_gate = name == "gate" and hasattr(base.get_submodule(parent), "experts")
    return is_gate or "router" in path.split(".")


def _require_adaptable(
    base: Any, asked: list[str], inside: list[str], idle: Collection[str]
) -> None:
    """Require that an adapter on each name will learn; PEFT is content if one name is known."""
    head, known = base.get_output_embeddings(), list(dict.fromkeys(map(leaf, inside)))
    parameters = {leaf(path) for path, _ in text_decoder(base).named_parameters()}
    renamed = renamed_by_peft(getattr(base.config, "model_type", None))
    heads = [path for path, m in base.named_modules() if m is head and is_named(path, asked)]
    there = [name for name in asked if any(is_named(path, [name]) for path in inside)]
    of_experts = [name for name in asked if renamed.get(name) in parameters]
    unknown = [name for name in asked if name not in (*there, *of_experts)]
    fix, settings = "leave it out, or lora.target_modules: all-linear", ALL_LINEAR
    if heads:
        problem = "the head cannot have an adapter, its product is part of the loss"
        fix = "leave lm_head out, or lora.target_modules: all-linear"
    elif past := [name for name in asked if leaf(name) in idle]:
        problem = f"training reads the weights of {past[0]} past an adapter, which would not learn"
    elif both := [name for name in there if name in of_experts]:
        problem = (
            f"{both[0]} names both a layer and experts of this model, and PEFT would adapt the"
            " experts alone"
        )
    elif unknown:
        names = ", ".join(map(repr, unknown))
        problem = f"the model has no linear layer {names}; its layers are {', '.join(known)}"
        fix, settings = did_you_mean(unknown[0], known), {}
    else:
        return
    raise RecipeError(f"lora.target_modules: {problem}", fix=fix, settings=settings)


def _pattern(base: Any, names: Collection[str], inside: Collection[str]) -> str | None:
    """Return a pattern of the other modules with these names; None if there are none."""
    kept = {path for path in inside if is_named(path, names)}
    others = {
        re.sub(r"\d+", "0", path)
        for path, _ in base.named_modules()
        if path not in kept and is_named(path, names)
    }
    parts = [re.sub(r"(?<![A-Za-z_])0(?![A-Za-z_])", r"\\d+", re.escape(one)) for one in others]
    # taken out here, but there for whoever loads the adapter beside the whole model
    parts += [rf"{re.escape(name)}\..+" for name in tower_of(base)]
    return "|".join(sorted(parts)) or None


def adapted_layers(lora: Lora, num_layers: int) -> list[int]:
    """Return the decoder layers that get an adapter.

    Raises:
        RecipeError: The model does not have one of them.
    """
    if lora.layers == "all":
        return list(range(num_layers))
    if max(lora.layers) >= num_layers:
        raise RecipeError(
            f"lora.layers names layer {max(lora.layers)}, and the model's last one is"
            f" {num_layers - 1}",
            fix=f"lora.layers: numbers from 0 to {num_layers - 1}",
        )
    return sorted(set(lora.layers))
