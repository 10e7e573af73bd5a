"""Adapters: the layers that get one, attaching and loading, float32 weights cast where used.

An adapter sits on linear layers of the text decoder; routers of experts get none. Shapes: C
channels in, D channels out.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.catalog.methods import Method
from strixft.model.architecture import outside_text, text_decoder, text_layers
from strixft.model.config import first_lines
from strixft.recipe.schema import Lora
from strixft.support.errors import RecipeError, StageError
from strixft.support.private_hf import renamed_by_peft
from strixft.support.tables import did_you_mean

ADAPTER_NAME = "default"
"""PEFT's name for the one adapter of a model."""

_ALL_LINEAR = {"lora.target_modules": "all-linear"}

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Model types whose kernels read the weights of `out_proj` past its adapter.

Source: PEFT 0.21, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`."""


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
    inside = [
        path
        for path, module in base.named_modules()
        if id(module) in decoder and is_linear(module) and not is_router(path, base)
    ]
    if isinstance(asked, list):
        _require_adaptable(base, asked, inside, idle)
        return Targets(asked, _pattern(base, asked, inside), [])
    taken = dict.fromkeys(idle, "training reads its weights past an adapter")
    renamed = renamed_by_peft(getattr(base.config, "model_type", None))
    taken |= dict.fromkeys(renamed, "PEFT takes the name for that of the experts")
    if getattr(base.config, "model_type", None) in _MAMBA:
        taken["out_proj"] = "kernels of Mamba layers read its weights past an adapter"
    names = list(dict.fromkeys(map(_leaf, inside)))
    kept = [name for name in names if name not in taken]
    left_out = [f"{name}: {taken[name]}" for name in names if name in taken]
    experts = (m.experts for m in text_decoder(base).modules() if hasattr(m, "experts"))
    if any(not any(map(is_linear, one.modules())) for one in experts):  # one fused parameter
        left_out.append("experts: those that a router chooses get no adapter")
    return Targets(kept, _pattern(base, kept, inside), left_out)


def _leaf(path: str) -> str:
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
    parent, _, leaf = path.rpartition(".")
    is_gate = leaf == "gate" and hasattr(base.get_submodule(parent), "experts")
    return is_gate or "router" in path.split(".")


def _require_adaptable(
    base: Any, asked: list[str], inside: list[str], idle: Collection[str]
) -> None:
    """Require that an adapter on each name will learn; PEFT is content if one name is known."""
    head, known = base.get_output_embeddings(), list(dict.fromkeys(map(_leaf, inside)))
    parameters = {_leaf(path) for path, _ in text_decoder(base).named_parameters()}
    renamed = renamed_by_peft(getattr(base.config, "model_type", None))
    heads = [path for path, m in base.named_modules() if m is head and is_named(path, asked)]
    there = [name for name in asked if any(is_named(path, [name]) for path in inside)]
    of_experts = [name for name in asked if renamed.get(name) in parameters]
    unknown = [name for name in asked if name not in (*there, *of_experts)]
    fix, settings = "leave it out, or lora.target_modules: all-linear", _ALL_LINEAR
    if heads:
        problem = "the head cannot have an adapter, its product is part of the loss"
        fix = "leave lm_head out, or lora.target_modules: all-linear"
    elif past := [name for name in asked if _leaf(name) in idle]:
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
    return "|".join(sorted(parts)) or None


class _MasterLinear(nn.Linear):
    """Keeps float32 weights (D, C) and multiplies in the dtype of its input."""

    factor: float = 1.0
    """Applied to the weights where they are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, C) to (…, D)
        return nn.functional.linear(x, (self.weight * self.factor).to(x.dtype))


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
    from peft.tuners.tuners_utils import BaseTunerLayer

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
            leaves = dict.fromkeys(_leaf(path) for path, m in base.named_modules() if path)
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

    targets = find_targets(model, lora.target_modules, idle)
    _require_savable(model, lora.modules_to_save)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rs,
        lora_dropout=lora.dropout,
        target_modules=targets.names,
        exclude_modules=targets.exclude,
        modules_to_save=list(lora.modules_to_save) or None,  # PEFT adds tied ones
        ensure_weight_tying=bool(lora.modules_to_save) and _is_tied(model),
        **_layers_for_peft(model, lora, kept),
        use_dora=method.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_warning():
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:  # experts in one parameter take no dropout and no DoRA
        raise RecipeError(
            f"PEFT cannot attach this adapter: {first_lines(error)}",
            fix="lora.target_modules: all-linear",
            settings=_ALL_LINEAR,
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
    return {"layers_to_transform": numbers, "layers_pattern": _leaf(name)}


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

    with _without_warning():
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
