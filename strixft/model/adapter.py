"""Adapters: attaching and loading, float32 weights cast where used.

Shapes: C channels in, D channels out.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import Method
from strixft.model.architecture import outside_text, text_decoder, text_layers
from strixft.model.config import first_lines
from strixft.model.packed_experts import shown_as_parameters
from strixft.model.targets import ALL_LINEAR, adapted_layers, find_targets, is_linear, leaf
from strixft.recipe.schema import Lora
from strixft.support.errors import RecipeError, StageError
from strixft.support.tables import did_you_mean

ADAPTER_NAME = "default"
"""PEFT's name for the one adapter of a model."""


class _MasterLinear(nn.Linear):
    """Keeps float32 weights (D, C) and multiplies in the dtype of its input."""

    factor: float = 1.0
    """Applied to the weights where they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, C) to (…, D)
        bias: torch.Tensor | None = self.bias  # that of a module which is trained whole
        bias = bias if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, (self.weight * self.factor).to(x.dtype), bias)


class AdapterDropout(nn.Dropout):
    """Drops inputs of an adapter, and keeps a mask of one byte a number on every device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, C) with a share of its numbers dropped, and the others scaled up."""
        # torch's own would be another operator on `meta`, where a plan counts, than on a GPU
        return torch.native_dropout(x, self.p, True)[0] if self.training else x


class _ScaledInside:
    """Adds the outputs of base and adapter in PEFT's LoRA layers, with A multiplied by its scaling.

    A factor behind B, even 1, would write out a scaled copy of the gradient of every layer's
    output. Takes the place of a `LoraVariant` in PEFT.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return base plus adapter, (…, D), for the input x (…, C)."""
        x = module.lora_dropout[active_adapter](x)
        adapter: torch.Tensor = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + adapter


def _use_master_weights(model: nn.Module, *, scale_inside: bool) -> None:
    """Keep an adapter's weights in float32, and multiply in the base's type."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    from strixft.model.expert_adapter import AdaptedExperts  # imports PEFT, which takes a second

    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        layer.cast_input_dtype_enabled = False  # PEFT would copy every input to float32
        for module in layer.modules():
            if type(module) is nn.Linear and module is not layer.get_base_layer():  # A and B
                module.to(torch.float32)
                module.__class__ = _MasterLinear
            elif type(module) is nn.Dropout:
                module.__class__ = AdapterDropout
        if isinstance(layer, ParamWrapper):
            layer.__class__ = AdaptedExperts
            continue
        is_lora = isinstance(layer, LoraLayer) and not layer.use_dora[ADAPTER_NAME]
        if scale_inside and is_lora:
            layer.lora_A[ADAPTER_NAME].factor = layer.scaling[ADAPTER_NAME]
            layer.lora_variant[ADAPTER_NAME] = _ScaledInside()


def _train_saved_modules(model: nn.Module) -> None:
    """Keep modules that are trained whole in float32, and let them answer in the base's type."""
    dtype = base_of(model).dtype
    for _, module in saved_modules(model):
        for buffer in (b for b in module.buffers() if b.is_floating_point()):
            buffer.copy_(buffer.to(dtype))  # a scale is rounded as the base rounds it
        module.to(torch.float32)
        if isinstance(module, nn.Linear):
            module.__class__ = _MasterLinear
        else:
            kind = type(module)
            module.__class__ = type(f"Master{kind.__name__}", (_InBaseType, kind), {})
            module.base_dtype = dtype


class _InBaseType:
    """Gives a module's result in the type of the base."""

    base_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return result.to(self.base_dtype)


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are trained whole beside an adapter, by their names in the base."""
    from peft.utils import ModulesToSaveWrapper

    for path, wrapper in base_of(model).named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            yield path, wrapper.modules_to_save[ADAPTER_NAME]


def _is_tied(base: Any) -> bool:
    """Return whether token embedding and head are one matrix."""
    head = base.get_output_embeddings()
    return head is not None and head.weight is base.get_input_embeddings().weight


def _require_savable(base: Any, names: Collection[str]) -> None:
    """Require that each name is that of modules whose own weights can be trained.

    Raises:
        RecipeError: It is not, with the reason.
    """
    for name in names:
        named = [(path, m) for path, m in base.named_modules() if path.endswith(name)]
        problem, fix = None, "lora.modules_to_save: [embed_tokens, lm_head]"
        if not named:
            leaves = dict.fromkeys(leaf(path) for path, m in base.named_modules() if path)
            problem, fix = f"the model has no module {name!r}", did_you_mean(name, list(leaves))
        for path, module in named:
            weights = list(module.parameters())
            if list(module.children()) or not weights:
                problem = f"{path} has no weights of its own, or other modules inside"
            elif not all(weight.is_floating_point() for weight in weights):
                problem = f"{path} is stored in few bits, and cannot be trained whole"
        if problem:
            raise RecipeError(f"lora.modules_to_save: {problem}", fix=fix)


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """PEFT 0.21 asks for a name that transformers 5.23 deprecates; remove when it does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def attach_adapter(
    model: nn.Module,
    method: Method,
    lora: Lora,
    idle: Collection[str] = (),
    kept: Sequence[int] | None = None,
) -> nn.Module:
    """Return the model with its trainable weights: a frozen base with an adapter, or all of it.

    Args:
        model: The base.
        method: Kind of the adapter, whose weights stay in float32.
        lora: Its size and its layers.
        idle: `Architecture.idle` of the base: these layers get no adapter.
        kept: The decoder layers that the model still has, by their numbers in the whole model.
    """
    if method.adapter == "none":
        model.requires_grad_(True)
        for name in outside_text(model):  # a vision tower sees no text and learns nothing
            model.get_submodule(name).requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, lora, idle)
    _require_savable(model, lora.modules_to_save)
    layers = _layers_for_peft(model, lora, kept)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rs,
        lora_dropout=lora.dropout,
        target_modules=targets.names,
        exclude_modules=targets.exclude,
        target_parameters=_in_layers(targets.parameters, **layers) or None,
        modules_to_save=list(lora.modules_to_save) or None,  # PEFT adds tied ones
        ensure_weight_tying=bool(lora.modules_to_save) and _is_tied(model),
        **layers,
        use_dora=method.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_warning(), shown_as_parameters(model):
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:  # experts in one parameter take no dropout and no DoRA
        settings = {"lora.experts": "shared"} if targets.parameters else ALL_LINEAR
        [(key, value)] = settings.items()
        raise RecipeError(
            f"PEFT cannot attach this adapter: {first_lines(error)}",
            fix=f"{key}: {value}",
            settings=settings,
        ) from error
    _use_master_weights(adapted, scale_inside=True)
    _train_saved_modules(adapted)
    return adapted


def _layers_for_peft(model: nn.Module, lora: Lora, kept: Sequence[int] | None) -> dict[str, Any]:
    """Return PEFT's settings for the layers that get an adapter."""
    if lora.layers == "all":
        return {}
    layers = text_layers(model)
    chosen = adapted_layers(lora, len(layers)) if kept is None else lora.layers
    numbers = [here for here, whole in enumerate(kept or range(len(layers))) if whole in chosen]
    name = next(path for path, module in model.named_modules() if module is layers)
    return {"layers_to_transform": numbers, "layers_pattern": leaf(name)}


def _in_layers(
    parameters: list[str], layers_to_transform: Sequence[int] = (), layers_pattern: str = ""
) -> list[str]:
    """Return the names of parameters in some layers: PEFT heeds the numbers for modules alone."""
    if not layers_pattern:
        return parameters
    return [f"{layers_pattern}.{n}.{name}" for n in layers_to_transform for name in parameters]


def copy_weights(model: nn.Module, folder: Path) -> None:
    """Give an adapter the weights of another one of its kind and size.

    Raises:
        StageError: They are not of one kind and size.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    state = load_peft_weights(str(folder), device="cpu")
    result = set_peft_model_state_dict(model, state)
    ours = (".lora_", ".modules_to_save.")
    missing = [name for name in result.missing_keys if any(part in name for part in ours)]
    if strange := [*missing, *result.unexpected_keys]:
        raise StageError(
            f"the adapter in {folder} is not that of this recipe: {strange[0]}",
            fix="leave init_from out, or name another run",
        )


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Load a trained adapter onto a base, with float32 weights as in training.

    Raises:
        StageError: It was trained on another model, or on another level of a wrapper.
    """
    from peft import PeftModel

    with _without_warning(), shown_as_parameters(model):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted: nn.Module = PeftModel.from_pretrained(model, folder)
        except (UserWarning, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise _other_model(model, folder) from error
    _use_master_weights(adapted, scale_inside=False)
    return adapted


def _other_model(model: Any, folder: Path) -> StageError:
    """Return the error of an adapter whose layers are not those of a model."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        first = min(file.keys()).removeprefix("base_model.model.").partition(".lora_")[0]
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    decoder = {id(module) for module in text_decoder(model).modules()}
    own = (path for path, m in model.named_modules() if id(m) in decoder and is_linear(m))
    return StageError(
        f"the adapter in {folder} was trained on another model, or another level of it: its first"
        f" layer is {first}, those of this {type(model).__name__} are named like"
        f" {next(own).removesuffix('.base_layer')}",
        fix=f"the model that it was trained on: {settings.get('base_model_name_or_path')}",
    )


def base_of(model: nn.Module) -> Any:
    """Return the transformers model inside an adapter, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers, in order."""
    return text_layers(base_of(model))
