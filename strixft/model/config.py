"""A model's `config.json`: read, checked, and refused with the place of each fault."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from strixft.catalog.models import MODELS
from strixft.support.errors import RecipeError
from strixft.support.tables import did_you_mean

MOST = {
    "vocab_size": 2**23,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
    "head_dim": 2**12,
    "sliding_window": 2**30,
    "max_position_embeddings": 2**30,
}
"""Largest sensible value of each size; the least is 1."""

OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "intermediate_size")
"""Sizes that may be null: transformers derives them (GPT-Neo's MLP), or does without."""

NEEDED_INSIDE = ("hidden_size", "num_hidden_layers")
NEEDED = (*NEEDED_INSIDE, "vocab_size", "num_attention_heads", "intermediate_size")
"""Sizes for which no default of transformers would be right; `save_pretrained` writes all of them.
A `text_config` leaves out defaults: only the first two are needed there."""

OLD_NAMES = {
    "hidden_size": ("n_embed",),
    "intermediate_size": ("block_ff_dim", "dense_intermediate_size"),
}
"""Names that transformers 5.23 reads besides `attribute_map`: Bloom and Falcon, LFM2, Inkling."""

HEAD_SIZES = {"head_dim", "kv_channels", "qk_rope_head_dim", "kv_lora_rank"}
"""Settings for the size of a head; without them it is the hidden size by the number of heads."""

SCALED_BY_FACTOR = ("linear", "dynamic", "yarn", "llama3")
"""Types of rotary positions that stretch by a factor."""

STORED_AS = ("bitsandbytes", "mxfp4")
"""Storage of quantised checkpoints that can be trained; MXFP4 as gpt-oss has it."""

Raw = Mapping[str, Any]
"""A configuration, or the part of it for the text model, as JSON has it."""


def _size_faults(text: Raw) -> Iterator[str]:
    for name, most in MOST.items():
        value = text.get(name, 1)
        if value is None and name in OPTIONAL:
            continue
        if name == "sliding_window" and text.get("use_sliding_window") is False:
            continue  # Qwen2-MoE writes 0 then
        per_layer = name == "intermediate_size" and isinstance(value, list)  # Gemma 3n
        each = value if per_layer and len(value) == text.get("num_hidden_layers") else [value]
        if any(type(one) is not int or not 1 <= one <= most for one in each):
            yield f"{name} should be a whole number from 1 to {most:,}, it is {value!r:.60}"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _rotary_faults(text: Raw) -> Iterator[str]:
    thetas = [text.get("rope_theta")]
    for place in ("rope_parameters", "rope_scaling"):
        rotary = text.get(place) or {}
        if not isinstance(rotary, Mapping):
            yield f"{place} should hold settings, it is {rotary!r:.60}"
            continue
        kind, factor = rotary.get("rope_type", rotary.get("type")), rotary.get("factor")
        if kind in SCALED_BY_FACTOR and not _is_positive(factor):
            yield f"{place} is of type {kind}, and its factor is {factor!r:.60}"
        thetas.append(rotary.get("rope_theta"))
    for theta in thetas:
        if theta is not None and not _is_positive(theta):
            yield f"rope_theta should be a number above 0, it is {theta!r:.60}"


def _setting_faults(text: Raw) -> Iterator[str]:
    from transformers.activations import ACT2FN

    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = text.get(name)
        if value is not None and (not isinstance(value, str) or value not in ACT2FN):
            near = did_you_mean(str(value), ACT2FN)
            yield f"{name}: transformers does not know {value!r:.60}; {near}"
    for name in ("dtype", "torch_dtype"):
        value = text.get(name) or "auto"
        if value != "auto" and not isinstance(getattr(torch, str(value), None), torch.dtype):
            yield f"{name}: torch has no {value!r:.60}"
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        value = text.get(name, 0)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < 1):
            yield f"{name} should be at least 0 and less than 1, it is {value!r:.60}"


def _relation_faults(text: Raw) -> Iterator[str]:
    heads, groups = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        yield f"num_attention_heads, {heads}, is not a multiple of num_key_value_heads, {groups}"
    kinds, layers = text.get("layer_types"), text.get("num_hidden_layers")
    if isinstance(kinds, list) and layers and len(kinds) != layers:
        yield f"layer_types has {len(kinds)} entries and num_hidden_layers is {layers}"
    size = text.get("head_dim") or 2
    if isinstance(heads, int) and not text.keys() & HEAD_SIZES:
        size = text.get("hidden_size", 0) / heads
    if isinstance(size, int | float) and size % 2:
        yield f"the size of a head, {size:g}, is not even, as rotary positions need it"


def _missing(raw: Raw, text: Raw) -> Iterator[str]:
    """Yield the needed sizes that no name of this type gives, as the type calls them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[raw["model_type"]]
    try:
        known = type(kind().get_text_config())
    except ValueError:  # a type with several text models, such as musicgen
        known = kind
    saved = known().to_dict()
    if "text_config" in kind.sub_configs and "hidden_size" not in text:
        return (yield f"text_config is missing: a {raw['model_type']} has its text model inside")
    for name in NEEDED_INSIDE if "text_config" in raw else NEEDED:
        own = known.attribute_map.get(name, name)  # GPT-2: `n_embd`
        called = {name, own, *OLD_NAMES.get(name, ())}
        if not called & text.keys() and {name, own} & saved.keys():
            yield f"{own} is missing"


def _faults(raw: Raw) -> list[str]:
    text = raw.get("text_config")
    if not isinstance(text, Mapping | None):
        return [f"text_config should hold settings, it is {text!r:.60}"]
    text = raw if text is None else text
    checks = (_size_faults, _rotary_faults, _setting_faults)
    found = [fault for check in checks for fault in check(text)] or _relation_faults(text)
    return [*_missing(raw, text), *found]


def _check_type(raw: Raw, place: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WRAPPERS,
    )

    model_type = raw.get("model_type")
    shipped = sorted({row.text_config["model_type"] for row in MODELS.values()})
    if not isinstance(model_type, str):
        problem = "model_type is missing"
        fix = f'"model_type": "llama" in {place}, or the type that the model has'
    elif model_type not in CONFIG_MAPPING:
        problem = (
            f"transformers {version('transformers')} does not know the model type {model_type!r}"
        )
        fix = (
            f"{did_you_mean(model_type, shipped)}; a newer type comes with a newer strixft"
            " (pip install --upgrade strixft), or with code of its own (trust_remote_code: true)"
        )
    elif model_type not in {**CAUSAL, **WRAPPERS}:
        problem = f"a {model_type} does not continue text"
        fix = f"a causal language model, such as one of: {', '.join(shipped)}"
    else:
        return
    raise RecipeError(f"{place}: {problem}", fix=fix)


_OF_STORAGE = re.compile(
    r"[-_.](?:awq|gptq|fp8|nvfp4|mxfp4|int[48]|w\d+a\d+|(?:unsloth-)?bnb|[48]bit)\b.*",
    re.IGNORECASE,
)
"""The part of a model's name on the hub that says how its weights are stored."""


def _refuse_stored(raw: Raw, place: str) -> None:
    """Refuse weights in a storage that no gradient goes through, such as FP8 or GPTQ."""
    stored = raw.get("quantization_config")
    kind = stored.get("quant_method") if isinstance(stored, Mapping) else None
    is_known = kind in STORED_AS and (kind != "mxfp4" or raw.get("model_type") == "gpt_oss")
    if kind is not None and not is_known:
        name = place.rpartition("/")[2]
        plain = _OF_STORAGE.sub("", name)
        named = f" ({plain}, going by the name)" if plain != name else ""
        raise RecipeError(
            f"{place}: the weights are stored as {kind}, which strixft cannot train",
            fix=f"model: the version of it with 16-bit weights{named}; on the hub it is often the"
            " one that was quantised, or its name ends in -BF16",
        )


def check_raw(raw: Any, place: str) -> None:
    """Refuse a configuration, as JSON has it, from which no training step can be built.

    Raises:
        RecipeError: With every fault found, and the place: a file or a hub id.
    """
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{place} has no settings", fix=f"write {place} again")
    _refuse_stored(raw, place)
    if "auto_map" in raw:
        return  # its own code says what it is
    _check_type(raw, place)
    if faults := _faults(raw):
        raise RecipeError(
            f"{place} describes no model: {'; '.join(faults)}",
            fix=f"correct {place}, or download the model again",
        )


def is_in_mxfp4(config: Any) -> bool:
    """Return whether a checkpoint's experts are stored in MXFP4, as those of gpt-oss are."""
    stored = getattr(config, "quantization_config", None) or {}
    return bool(stored.get("quant_method") == "mxfp4")


def place_of(source: str) -> str:
    """Return the name of a model's configuration in errors."""
    return str(Path(source) / "config.json") if Path(source).is_dir() else source


def first_lines(error: Exception) -> str:
    """Return an error's text as one line of at most 300 letters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_config(source: str, *, offline: bool, trust_remote_code: bool = False) -> Any:
    """Read and check the configuration of a folder or hub id.

    Raises:
        RecipeError: The model cannot be trained.
        OSError: The file cannot be read.
        ValueError: The model needs code of its own.
    """
    from transformers import AutoConfig, PreTrainedConfig

    place = place_of(source)
    if Path(source).is_dir() and not Path(place).is_file():
        raise RecipeError(
            f"{place} is missing",
            fix="a model's folder holds config.json, its tokenizer and *.safetensors:"
            f" hf download ORG/NAME --local-dir {source}",
        )
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, local_files_only=offline)
    except RecursionError:
        raise RecipeError(f"{place} is nested too deeply", fix=f"write {place} again") from None
    check_raw(raw, place)
    try:
        return AutoConfig.from_pretrained(
            source, local_files_only=offline, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever the class of a configuration raises
        raise RecipeError(
            f"{place} describes no model: {first_lines(error)}", fix=f"correct {place}"
        ) from error


def warnings_of(config: Any, max_length: int) -> list[str]:
    """Return sentences about rows of this length that the model was not trained for."""
    text, found = config.get_text_config(), []
    positions = getattr(text, "max_position_embeddings", None)
    if positions and max_length > positions:
        found.append(
            f"rows of {max_length:,} tokens are longer than the {positions:,} positions that the"
            " model was trained for: training runs, but the model does not know the positions"
            f" beyond them (--set dataset.max_length={positions})"
        )
    rotary = getattr(text, "rope_parameters", None) or {}
    for one in (rotary, *rotary.values()):  # each type of layer may have its own
        is_longrope = isinstance(one, Mapping) and one.get("rope_type") == "longrope"
        switch = one.get("original_max_position_embeddings") if is_longrope else None
        if switch and max_length > switch:
            found.append(
                f"a chat of more than {switch:,} tokens uses the long factors of LongRoPE, and"
                " transformers then uses them for all chats of its micro-batch: short chats are"
                " trained with other factors than they are answered"
                f" (--set dataset.max_length={switch})"
            )
            break
    return found
