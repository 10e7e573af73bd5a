"""Attach, load and find adapters, with float32 weights that are cast where they are used."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import Method
from strixft.model.architecture import (
    outside_text,
    text_layers,
)
from strixft.model.shapes import IDLE
from strixft.model.targets import find_targets
from strixft.recipe.schema import Lora

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
