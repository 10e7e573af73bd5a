"""The model that a recipe trains: configuration, base, quantised layers and adapter put together.

The same model is built in three ways: with its weights (`load_base`), as shapes on `meta`
(`shape_base`), and with random weights (`random_model`); `build` adds the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import METHODS, Method
from strixft.model.adapter import attach_adapter
from strixft.model.architecture import architecture_of, build_shape, with_layers
from strixft.model.config import is_in_mxfp4
from strixft.model.files import fetch, refuse_pickles
from strixft.model.quantised import NF4, draw_weights, finish_loaded, quantise_shape
from strixft.model.source import load_config, model_errors_explained, model_source
from strixft.model.weights import Loading
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError


def native_dtype(device: str, *, bfloat16: bool) -> torch.dtype:
    """Return the type of a base: float32 on a CPU, else bf16 if the device has it, else float16."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if bfloat16 else torch.float16


def quantization_of(method: Method, dtype: torch.dtype) -> Any:
    """Return the `BitsAndBytesConfig` of a method that computes in a type; None for `native`."""
    from transformers import BitsAndBytesConfig

    if method.base == "nf4":
        return BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True) if method.base == "int8" else None


def require_stored(config: Any, method: Method) -> None:
    """Refuse a method that stores its base otherwise than the checkpoint.

    Raises:
        RecipeError: With the method that fits.
    """
    found = getattr(config, "quantization_config", None)
    if found is None or (is_in_mxfp4(config) and method.base != "int8"):
        return
    stored = found.get("quant_method")
    if found.get("load_in_8bit"):
        stored = "int8"
    elif found.get("load_in_4bit"):
        stored = found.get("bnb_4bit_quant_type", "fp4")
    if stored != method.base:
        fitting = [row.name for row in METHODS.values() if row.base == stored]
        fitting += ["qlora"] if stored == "mxfp4" else []
        raise RecipeError(
            f"the weights are stored as {stored}, and method {method.name} stores them as"
            f" {method.base}",
            fix=f"method: {fitting[0]}" if fitting else "model: the version that is not quantised",
            settings={"method": fitting[0]} if fitting else None,
        )


def _compute_in(config: Any, dtype: torch.dtype) -> None:
    """Make a checkpoint in 4 or 8 bits compute in the type of the run."""
    found = getattr(config, "quantization_config", None)
    if found is not None and not is_in_mxfp4(config):
        config.quantization_config = found | {
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")
        }


def fetch_base(recipe: Recipe) -> Path | None:
    """Return the folder with the base's weights; download what is missing.

    Returns:
        None if they are not on this machine and must not be downloaded.

    Raises:
        RecipeError: The model does not exist, or its weights are a pickle.
        HostError: The disk has no room for the download.
    """
    source = model_source(recipe.model)
    refuse_pickles(source)
    with model_errors_explained(recipe.model):
        return fetch(source, offline=recipe.offline)


def load_base(recipe: Recipe, device: str, dtype: torch.dtype) -> nn.Module:
    """Load the base model with its weights on a device.

    Raises:
        RecipeError: The model does not exist, its weights are a pickle, some are missing, or they
            are stored otherwise than the method stores them.
        HostError: The disk has no room for the download.
        StageError: A file of the weights is damaged.
    """
    method, folder, config = METHODS[recipe.method], fetch_base(recipe), load_config(recipe)
    require_stored(config, method)
    _compute_in(config, dtype)
    with model_errors_explained(recipe.model):
        model: nn.Module = Loading(
            source=model_source(recipe.model),
            folder=folder,
            config=config,
            device=device,
            dtype=dtype,
            quantization=None if is_in_mxfp4(config) else quantization_of(method, dtype),
            unpack=method.base == "native",
            offline=recipe.offline,
            trust_remote_code=recipe.trust_remote_code,
        ).run()
    finish_loaded(model)
    return model


_last: dict[Any, nn.Module] = {}


def _on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a model on `meta` to copy: a plan asks for that of one configuration 20 times."""
    key = type(config), config.to_json_string(use_diff=False), dtype
    if key not in _last:
        _last.clear()
        with torch.device("meta"):
            _last[key] = build_shape(config, dtype)
    return _last[key]


def shape_base(
    config: Any,
    method: Method,
    dtype: torch.dtype,
    *,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Build the base model as shapes on `meta`: nothing is loaded or allocated.

    Args:
        config: The model's configuration.
        method: Storage of the base.
        dtype: Type in which it computes.
        layers: Only these of the decoder's layers; default: all.
    """
    whole = _on_meta(config, dtype)
    model: nn.Module = copy.deepcopy(whole) if layers is None else with_layers(whole, layers)
    if method.base != "native":
        quantise_shape(model, method, dtype, getattr(config, "quantization_config", None) or {})
    return model


def build(
    recipe: Recipe,
    device: str,
    dtype: torch.dtype,
    config: Any | None = None,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Return the model a recipe trains.

    Args:
        recipe: Names the model, the method and the adapter.
        device: `cpu`, `cuda`, or `meta` for shapes alone.
        dtype: Type in which the base computes.
        config: For `meta`: the model's configuration; default: that of the recipe's model.
        layers: For `meta`: only these of the decoder's layers.
    """
    method, config = METHODS[recipe.method], config or load_config(recipe)
    idle = architecture_of(config).idle
    if device != "meta":
        return attach_adapter(load_base(recipe, device, dtype), method, recipe.lora, idle)
    base = shape_base(config, method, dtype, layers=layers)
    with torch.device("meta"):
        return attach_adapter(base, method, recipe.lora, idle, layers)


def random_model(
    recipe: Recipe,
    config: Any,
    device: str,
    dtype: torch.dtype,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Return what `build` does with random weights, made on the device, to measure it."""
    model = build(recipe, "meta", dtype, config, layers)
    draw_weights(model, device)
    return model
