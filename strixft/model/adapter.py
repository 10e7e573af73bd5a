"""Adapters: the layers that get one, attaching and loading, float32 weights cast where used.

An adapter sits on linear layers of the text decoder; routers of experts get none. Shapes: C
channels in, D channels out.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import Method
from strixft.model.architecture import outside_text, text_decoder, text_layers
from strixft.model.shapes import IDLE
from strixft.recipe.schema import Lora
from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean

ADAPTER_NAME = "default"
"""PEFT's name for the one adapter of a model."""

_ALL_LINEAR = "leave it out, or lora.target_modules: all-linear"


@dataclass(frozen=True, slots=True)
class Targets:
    """Layers that get an adapter, as PEFT takes them."""

    names: list[str]
    """Last parts of the layers' names."""
    exclude: str | None
    """Pattern of layers with such names that get no adapter."""
    left_out: list[str]
    """Sentences about layers that `all-linear` does not adapt."""


def find_targets(base: Any, asked: str | list[str], idle: Collection[str] = ()) -> Targets:
    """Find the layers that a recipe names.

    Args:
        base: The model.
        asked: `all-linear`, or last parts of layers' names.
        idle: Last parts of the names of layers that training does not call.

    Raises:
        RecipeError: A name does not belong to any linear layer.
    """
    decoder = {id(module) for module in text_decoder(base).modules()}
    layers = _linear_layers(base)
    inside = {n: m for n, m in layers.items() if id(m) in decoder and not _is_router(n, base)}
    if isinstance(asked, list):
        _require_known(base, asked, inside, idle)
        wanted = [path for path in inside if _is_named(path, asked)]
        return Targets(asked, _pattern(base, asked, wanted), [])
    taken = dict.fromkeys(idle, "training reads its weights past an adapter")
    taken |= dict.fromkeys(_renamed_by_peft(base), "PEFT takes the name for that of the experts")
    if getattr(base.config, "model_type", None) in _MAMBA:
        taken["out_proj"] = "kernels of Mamba layers read its weights past an adapter"
    names = dict.fromkeys(_leaf(path) for path in inside)
    kept = [name for name in names if name not in taken]
    wanted = [path for path in inside if _leaf(path) in kept]
    left_out = [f"{name}: {taken[name]}" for name in names if name in taken]
    blocks = (m for m in text_decoder(base).modules() if hasattr(m, "experts"))
    if any(not _linear_layers(block.experts) for block in blocks):  # fused into one parameter
        left_out.append("experts: those that a router chooses get no adapter")
    return Targets(kept, _pattern(base, kept, wanted), left_out)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _is_named(path: str, names: Collection[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _linear_layers(base: Any) -> dict[str, nn.Module]:
    """Return the modules that multiply by a matrix and do nothing else, by name, in order."""

    def is_linear(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        is_own = type(module).__module__.startswith("transformers.models.")  # routers, for example
        is_matrix = weight is not None and weight.ndim == 2
        return is_matrix and not isinstance(module, nn.Embedding) and not is_own

    return {name: module for name, module in base.named_modules() if is_linear(module)}


def _is_router(path: str, base: Any) -> bool:
    """Return whether a layer decides which experts a token goes to."""
    *parents, leaf = path.split(".")
    block = base.get_submodule(".".join(parents))
    return "router" in path.split(".") or (leaf == "gate" and hasattr(block, "experts"))


def _require_known(
    base: Any, asked: list[str], inside: Mapping[str, nn.Module], idle: Collection[str]
) -> None:
    """Require that every name belongs to a linear layer; PEFT is content if one of them does."""
    unknown = []
    parameters = {_leaf(name) for name, _ in text_decoder(base).named_parameters()}
    renamed = _renamed_by_peft(base)
    for name in asked:
        is_there = any(_is_named(path, [name]) for path in inside)
        is_of_experts = renamed.get(name) in parameters
        named = [module for path, module in base.named_modules() if _is_named(path, [name])]
        if base.get_output_embeddings() in named:
            raise RecipeError(
                "lora.target_modules: the head cannot have an adapter, its product is part of the"
                " loss",
                fix="leave lm_head out, or lora.target_modules: all-linear",
            )
        if not is_there and not is_of_experts:
            unknown.append(name)
        if _leaf(name) in idle:
            raise RecipeError(
                f"lora.target_modules: training reads the weights of {name} past an adapter, which"
                " would not learn",
                fix=_ALL_LINEAR,
            )
        if is_there and is_of_experts:
            raise RecipeError(
                f"lora.target_modules: {name} names both a layer and experts of this model, and"
                " PEFT would adapt the experts alone",
                fix=_ALL_LINEAR,
            )
    if unknown:
        known = dict.fromkeys(_leaf(path) for path in inside)
        raise RecipeError(
            f"lora.target_modules: the model has no linear layer {', '.join(map(repr, unknown))};"
            f" its layers are {', '.join(known)}",
            fix=did_you_mean(unknown[0], known),
        )


def _renamed_by_peft(base: Any) -> dict[str, str]:
    """Return the names that PEFT takes for a mixture's experts or router, wherever they stand.

    Source: PEFT 0.21, utils/transformers_weight_conversion.py, `_convert_peft_config_moe`.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an earlier PEFT renames nothing
        return {}
    kind = getattr(base.config, "model_type", None)
    if conversion.get_checkpoint_conversion_mapping(kind) is None:
        return {}
    like = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
    found: dict[str, str] = conversion._MOE_TARGET_MODULE_MAPPING.get(like, {})
    return found


_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Model types whose kernels read the weights of `out_proj` past its adapter.

Source: PEFT 0.21, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`."""


def _pattern(base: Any, names: Collection[str], wanted: Collection[str]) -> str | None:
    """Return a pattern of the other modules with these names; None if there are none."""
    kept = set(wanted)
    others = {
        re.sub(r"\d+", "0", path)
        for path, _ in base.named_modules()
        if path not in kept and _is_named(path, names)
    }
    parts = [re.sub(r"(?<![A-Za-z_])0(?![A-Za-z_])", r"\\d+", re.escape(one)) for one in others]
    return "|".join(sorted(parts)) or None


class _MasterLinear(nn.Linear):
    """Keeps float32 weights (D, C) and multiplies in the dtype of its input."""

    factor: float = 1.0
    """Applied to the weights where they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, C) to (…, D)
        return nn.functional.linear(x, (self.weight * self.factor).to(x.dtype))


def _use_master_weights(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # PEFT would copy every input to float32
            for module in layer.modules():
                if type(module) is nn.Linear and module is not layer.get_base_layer():  # A and B
                    module.to(torch.float32)
                    module.__class__ = _MasterLinear


class _ScaledInside:
    """Adds the outputs of base and adapter in PEFT's LoRA layers, with A multiplied by α/r.

    A factor behind B, even 1, would write out a scaled copy of the gradient of every layer's
    output. Takes the place of a `LoraVariant` in PEFT.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return base plus adapter, (…, D), for the input x (…, C)."""
        adapter: torch.Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + adapter


def _scale_inside(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.use_dora[ADAPTER_NAME]:
            layer.lora_A[ADAPTER_NAME].factor = layer.scaling[ADAPTER_NAME]
            layer.lora_variant[ADAPTER_NAME] = _ScaledInside()


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """PEFT 0.21 asks for a name that transformers 5.23 deprecates; remove when it does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def attach_adapter(model: nn.Module, method: Method, lora: Lora) -> nn.Module:
    """Return the model with its trainable weights: a frozen base with an adapter, or all of it.

    Adapter weights stay in float32 and are cast to the base's dtype where they are used.
    """
    if method.adapter == "none":
        model.requires_grad_(True)
        for name in outside_text(model):  # a vision tower sees no text and learns nothing
            model.get_submodule(name).requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, lora.target_modules, getattr(model, IDLE, ()))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets.names,
        exclude_modules=targets.exclude,
        use_dora=method.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    with _without_warning():
        adapted: nn.Module = get_peft_model(model, config)
    _use_master_weights(adapted)
    _scale_inside(adapted)
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Load a trained adapter onto a base, with float32 weights as in training."""
    from peft import PeftModel

    with _without_warning():
        adapted: nn.Module = PeftModel.from_pretrained(model, folder)
    _use_master_weights(adapted)
    return adapted


def base_of(model: nn.Module) -> Any:
    """Return the transformers model inside an adapter, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers, in order."""
    return text_layers(base_of(model))
