"""Attach, load and find adapters; choose the layers that get one."""

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
from strixft.model.architecture import (
    outside_text,
    text_decoder,
    text_layers,
)
from strixft.model.shapes import IDLE
from strixft.recipe.schema import Lora
from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean


@dataclass(frozen=True, slots=True)
class Targets:
    """What PEFT is told."""

    names: list[str]
    """Last parts of the layers' names."""
    exclude: str | None
    """Layers of such names that stay as they are, as a pattern."""
    left_out: list[str]
    """What `all-linear` does not adapt, in sentences."""


def _is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix and does nothing else."""
    weight = getattr(module, "weight", None)
    is_own = type(module).__module__.startswith("transformers.models.")  # routers are, and more
    return (
        weight is not None
        and weight.ndim == 2
        and not isinstance(module, nn.Embedding)
        and not is_own
    )


def _linear_layers(base: Any) -> dict[str, nn.Module]:
    """Linear layers of a model by name, in order."""
    return {name: module for name, module in base.named_modules() if _is_linear(module)}


def _is_router(name: str, base: Any) -> bool:
    """Whether a layer says which experts a token goes to."""
    *parents, leaf = name.split(".")
    block = base.get_submodule(".".join(parents))
    return "router" in name.split(".") or (leaf == "gate" and hasattr(block, "experts"))


def find_targets(base: Any, asked: str | list[str], idle: Collection[str] = ()) -> Targets:
    """Find the layers that a recipe names.

    Args:
        base: The model.
        asked: `all-linear`, or last parts of layers' names.
        idle: Last parts of the names of layers that training does not call.

    Raises:
        RecipeError: A name means no linear layer.
    """
    decoder = {id(module) for module in text_decoder(base).modules()}
    layers = _linear_layers(base)
    inside = {n: m for n, m in layers.items() if id(m) in decoder and not _is_router(n, base)}
    if isinstance(asked, list):
        _require_known(base, asked, inside, idle)
        wanted = [n for n in inside if any(f".{n}".endswith(f".{name}") for name in asked)]
        return Targets(asked, _pattern(base, asked, wanted), [])
    taken = dict.fromkeys(idle, "training reads its weights past an adapter")
    taken |= _taken_by_peft(base)
    names = dict.fromkeys(name.rpartition(".")[2] for name in inside)
    kept = [name for name in names if name not in taken]
    wanted = [name for name in inside if name.rpartition(".")[2] in kept]
    left_out = [f"{name}: {taken[name]}" for name in names if name in taken]
    left_out += _experts(base)
    return Targets(kept, _pattern(base, kept, wanted), left_out)


def _require_known(
    base: Any, asked: list[str], inside: Mapping[str, nn.Module], idle: Collection[str]
) -> None:
    """Require that every name means a linear layer; PEFT is content if one of them does."""
    unknown = []
    parameters = {name.rpartition(".")[2] for name, _ in text_decoder(base).named_parameters()}
    renamed = _renamed_by_peft(base)
    for name in asked:
        is_there = any(f".{path}".endswith(f".{name}") for path in inside)
        is_of_experts = renamed.get(name) in parameters
        if base.get_output_embeddings() in _named(base, name):
            raise RecipeError(
                "lora.target_modules: the head cannot have an adapter, its product is part of the"
                " loss",
                fix="leave lm_head out, or lora.target_modules: all-linear",
            )
        if not is_there and not is_of_experts:
            unknown.append(name)
        if name.rpartition(".")[2] in idle:
            raise RecipeError(
                f"lora.target_modules: training reads the weights of {name} past an adapter, which"
                " would not learn",
                fix="leave it out, or lora.target_modules: all-linear",
            )
        if is_there and is_of_experts:
            raise RecipeError(
                f"lora.target_modules: {name} is the name of a layer and of experts here, and PEFT"
                " would adapt the experts alone",
                fix="leave it out, or lora.target_modules: all-linear",
            )
    if unknown:
        known = dict.fromkeys(path.rpartition(".")[2] for path in inside)
        raise RecipeError(
            f"lora.target_modules: the model has no linear layer {', '.join(map(repr, unknown))};"
            f" its layers are {', '.join(known)}",
            fix=did_you_mean(unknown[0], known),
        )


def _named(base: Any, name: str) -> list[nn.Module]:
    return [module for path, module in base.named_modules() if f".{path}".endswith(f".{name}")]


def _renamed_by_peft(base: Any) -> dict[str, str]:
    """Names that mean a mixture's experts or router for PEFT, whatever else has them.

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
"""PEFT 0.21, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`: kernels of these read the
weights of `out_proj` past its adapter."""


def _taken_by_peft(base: Any) -> dict[str, str]:
    """Names that `all-linear` leaves out, with the reason."""
    found = dict.fromkeys(_renamed_by_peft(base), "PEFT takes the name for that of the experts")
    if getattr(base.config, "model_type", None) in _MAMBA:
        found["out_proj"] = "kernels of Mamba layers read its weights past an adapter"
    return found


def _experts(base: Any) -> list[str]:
    blocks = (m for m in text_decoder(base).modules() if hasattr(m, "experts"))
    fused = any(not list(_linear_layers(block.experts)) for block in blocks)
    return ["experts: those that a router chooses stay as they are"] if fused else []


def _pattern(base: Any, names: list[str], wanted: list[str]) -> str | None:
    """Return what matches the other modules of these names; None where there are none."""
    kept = set(wanted)
    others = {
        re.sub(r"\d+", "0", path)
        for path, _ in base.named_modules()
        if path not in kept and any(f".{path}".endswith(f".{name}") for name in names)
    }
    parts = [re.sub(r"(?<![A-Za-z_])0(?![A-Za-z_])", r"\\d+", re.escape(one)) for one in others]
    return "|".join(sorted(parts)) or None


ADAPTER_NAME = "default"
"""What PEFT calls the one adapter of a model."""


class _MasterLinear(nn.Linear):
    """Keeps float32 weights and multiplies in the dtype of its input."""

    factor: float = 1.0
    """Of the weights, where they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, C)
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
    """How PEFT's layers with LoRA add up what A and B give, where A is multiplied by α/r.

    A factor behind B, be it 1, would write out a scaled copy of the gradient of every layer's
    output. Takes the place of a `LoraVariant` in PEFT.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Base and adapter, (…, C)."""
        adapter: torch.Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + adapter


def _scale_inside(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.use_dora[ADAPTER_NAME]:
            layer.lora_A[ADAPTER_NAME].factor = layer.scaling[ADAPTER_NAME]
            layer.lora_variant[ADAPTER_NAME] = _ScaledInside()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT 0.21 asks for a name that transformers 5.23 deprecates; remove when it does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def attach_adapter(model: nn.Module, method: Method, lora: Lora) -> nn.Module:
    """The model with its trainable weights: a frozen base with an adapter, or all of it.

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
    with _quiet():
        adapted: nn.Module = get_peft_model(model, config)
    _use_master_weights(adapted)
    _scale_inside(adapted)
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The base with a trained adapter, in the dtype rules of training."""
    from peft import PeftModel

    with _quiet():
        adapted: nn.Module = PeftModel.from_pretrained(model, folder)
    _use_master_weights(adapted)
    return adapted


def base_of(model: nn.Module) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, in order."""
    return text_layers(base_of(model))
