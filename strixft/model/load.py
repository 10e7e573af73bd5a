"""Load the base model and its adapter on a device, or build them as shapes on `meta`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.attention.interface import NAME
from strixft.catalog.methods import METHODS, Method
from strixft.catalog.models import MODELS
from strixft.model import int8
from strixft.model.adapter import attach_adapter
from strixft.model.architecture import architecture_of, auto_class
from strixft.model.config import first_lines, read_config
from strixft.model.files import EMBEDDED, embedded_folder, fetch, refuse_pickles
from strixft.model.shapes import IDLE, NF4, keep_packing, nf4_parameter, shape_base
from strixft.model.weights import Target, load_weights, require_weights
from strixft.recipe.schema import Recipe
from strixft.support.disk import cache_folder
from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean


def model_source(name: str) -> str:
    """Return what transformers should load for a recipe's `model`: a folder or a hub id.

    Raises:
        RecipeError: An embedded model has another name.
        HostError: The package with the embedded model is missing.
    """
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise RecipeError(
                f"there is no embedded model {name!r}", fix=f"model: {next(iter(EMBEDDED))}"
            )
        return str(embedded_folder(name))
    path = os.path.expanduser(name)
    return path if os.path.isdir(path) else name


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of loading a model into one that says what to change."""
    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> RecipeError:
    path = Path(os.path.expanduser(name))
    if path.is_absolute() and not os.path.isdir(path):
        beside = [file.parent.name for file in sorted(path.parent.glob("*/config.json"))]
        near = did_you_mean(path.name, beside) if beside else "a folder that holds config.json"
        return RecipeError(
            f"model: {path} is not a folder",
            fix=f"{near}   (relative to the recipe's file, or with --set to the current folder)",
        )
    if "trust_remote_code" in str(error):
        return RecipeError(
            f"model {name!r} runs Python code of its own when it is loaded",
            fix="read its *.py files; then, if you trust them: trust_remote_code: true",
        )
    return RecipeError(
        f"model {name!r} cannot be loaded: {first_lines(error)}",
        fix="model: a folder with config.json, a hub id (is the network there? is it gated:"
        " hf auth login), or embedded:smollm2-135m",
    )


def _config_source(name: str) -> str:
    """Return where to read a model's `config.json`: its own file, else the one that ships."""
    from huggingface_hub import try_to_load_from_cache

    is_here = name not in MODELS or Path(name).is_dir()
    if is_here or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return model_source(name)
    return str(MODELS[name].path)


def load_config(recipe: Recipe) -> Any:
    """Return the model's checked configuration; the shipped one until the model is downloaded.

    Raises:
        RecipeError: The model does not exist, its configuration is damaged, or it needs code of its
            own.
    """
    with _explained(recipe.model):
        return read_config(
            _config_source(recipe.model),
            offline=recipe.offline,
            trust_remote_code=recipe.trust_remote_code,
        )


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the model's tokenizer.

    Raises:
        RecipeError: The model does not exist.
    """
    from transformers import AutoTokenizer

    with _explained(recipe.model):
        return AutoTokenizer.from_pretrained(
            model_source(recipe.model),
            local_files_only=recipe.offline,
            trust_remote_code=recipe.trust_remote_code,
        )


def native_dtype(device: str, *, bfloat16: bool) -> torch.dtype:
    """Return the type of a base: float32 on a CPU, else bf16 if the device has it, else float16."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if bfloat16 else torch.float16


def _quantization(method: Method, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if method.base == "nf4":
        return BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True) if method.base == "int8" else None


def _stored_as(config: Any) -> str:
    """Return the storage of a checkpoint's weights: `native`, or the `base` of a method."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return "native"
    if stored.get("load_in_8bit"):
        return "int8"
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    return str(kind) if stored.get("load_in_4bit") else str(stored.get("quant_method"))


def _use_stored(config: Any, method: Method, dtype: torch.dtype) -> None:
    """Make a quantised checkpoint compute in the type of the run.

    Raises:
        RecipeError: The method stores its base otherwise than the checkpoint.
    """
    stored = _stored_as(config)
    if stored == "native":
        return
    if stored != method.base:
        fitting = [row.name for row in METHODS.values() if row.base == stored]
        raise RecipeError(
            f"the weights are stored as {stored}, and method {method.name} stores them as"
            f" {method.base}",
            fix=f"method: {fitting[0]}" if fitting else "model: the version that is not quantised",
        )
    config.quantization_config = config.quantization_config | {
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")
    }


def _load_by_transformers(recipe: Recipe, source: str, target: Target) -> Any:
    model, info = auto_class(load_config(recipe)).from_pretrained(
        source,
        dtype=target.dtype,
        quantization_config=target.quantization,
        device_map={"": target.device},
        attn_implementation=target.attention,
        local_files_only=recipe.offline,
        use_safetensors=True,
        trust_remote_code=recipe.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
    )
    require_weights(source, model, info)
    return model


def load_base(recipe: Recipe, device: str, dtype: torch.dtype) -> nn.Module:
    """Load the base model with its weights on a device.

    Raises:
        RecipeError: The model does not exist, its weights are a pickle, some are missing, or they
            are stored otherwise than the method stores them.
        HostError: The disk has no room for the download.
        StageError: A file of the weights is damaged.
    """
    source, method = model_source(recipe.model), METHODS[recipe.method]
    refuse_pickles(source)
    target = Target(
        device=device,
        dtype=dtype,
        quantization=_quantization(method, dtype),
        attention=NAME,
        cache=cache_folder() / "nf4",
    )
    config = load_config(recipe)
    _use_stored(config, method, dtype)
    with _explained(recipe.model):
        folder = fetch(source, offline=recipe.offline)
        streamed = load_weights(source, folder, config, target)
        model: nn.Module = streamed or _load_by_transformers(recipe, source, target)
    int8.use_own_product(model)
    keep_packing(model)
    setattr(model, IDLE, architecture_of(config).idle)
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
    if device != "meta":
        return attach_adapter(load_base(recipe, device, dtype), method, recipe.lora)
    base = shape_base(config, method, dtype, layers=layers)
    with torch.device("meta"):
        return attach_adapter(base, method, recipe.lora)


def _random(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a random tensor of the same shape and type; floats are drawn from N(0, 0.02²)."""
    if tensor.dtype in (torch.uint8, torch.int8):
        limits = torch.iinfo(tensor.dtype)
        return torch.randint(
            limits.min, limits.max + 1, tensor.shape, dtype=tensor.dtype, device=device
        )
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(std=0.02)


def _fill_quantisation(state: Any, device: str) -> None:
    for name, value in list(vars(state).items()):
        if isinstance(value, torch.Tensor):
            setattr(state, name, _random(value, device))
    if state.state2 is not None:
        _fill_quantisation(state.state2, device)


def random_model(
    recipe: Recipe,
    config: Any,
    device: str,
    dtype: torch.dtype,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Return the model a recipe trains with random weights, made on the device, to measure it.

    Args:
        recipe: Method and adapter.
        config: The model's configuration.
        device: Device of the weights.
        dtype: Type in which the base computes.
        layers: Only these of the decoder's layers.
    """
    model = build(recipe, "meta", dtype, config, layers)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            state = getattr(parameter, "quant_state", None)
            filled = _random(parameter, device)
            if state is None:
                fresh = nn.Parameter(filled, requires_grad=parameter.requires_grad)
            else:
                _fill_quantisation(state, device)
                fresh = nf4_parameter(filled, state)
            module.register_parameter(name, fresh)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
    model.tie_weights()  # type: ignore[operator]
    return model
