"""The weights of a base model, from disk to a device.

transformers builds the model, matches names, converts, quantises and ties; it takes each tensor
when it needs it. What is here gives it tensors that are read then, so that the host holds a few
pieces of a file and the device one tensor as it was stored, and keeps the 4-bit result on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from strixft.model import nf4_cache
from strixft.model.architecture import auto_class, outside_text
from strixft.model.config import place_of
from strixft.model.files import shard_paths
from strixft.model.stream import DTYPES, DamagedError, Shard, Sums, streaming
from strixft.support.errors import RecipeError, StageError
from strixft.support.progress import say

__all__ = ["Target", "load_weights", "require_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How a model is to be loaded."""

    device: str
    dtype: torch.dtype
    quantization: Any
    """A `BitsAndBytesConfig`, or None."""
    attention: str
    """Name that transformers knows."""
    cache: Path
    """Folder of the 4-bit weights that are kept."""


def load_weights(source: str, folder: Path | None, config: Any, target: Target) -> nn.Module | None:
    """A base model, streamed from its files or from 4-bit weights that were kept.

    Args:
        source: What the recipe calls the model.
        folder: Its files.
        config: Its configuration.
        target: Device, type and storage.

    Returns:
        None where only transformers itself can load it, which is said in one line.

    Raises:
        RecipeError: The files lack weights that the configuration describes.
        StageError: A file is damaged.
    """
    paths = shard_paths(folder) if folder else []
    hindrance = _hindrance(folder, paths, config)
    if folder is None or hindrance:
        say(f"weights are loaded by transformers, not streamed: {hindrance}")
        return None
    model = _quantised(source, folder, paths, config, target)
    model.config.name_or_path = model.name_or_path = source  # PEFT writes the second down
    _use_generation_settings(model, folder)
    loaded: nn.Module = model
    return loaded


def _hindrance(folder: Path | None, paths: Sequence[Path], config: Any) -> str | None:
    """Why a model cannot be streamed."""
    if getattr(config, "auto_map", None):
        return "the model comes with code of its own"
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return "its files have names of their own"
    if folder is None or not paths:
        return "there is no model.safetensors, nor an index of its parts"
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds an adapter"
    return next(filter(None, map(_unknown_type, paths)), None)


def _unknown_type(path: Path) -> str | None:
    with Shard(path) as shard:
        found = {entry.dtype for entry in shard.entries.values()} - DTYPES.keys()
    return f"{path.name} holds numbers of type {sorted(found)[0]}" if found else None


def _quantised(
    source: str, folder: Path, paths: Sequence[Path], config: Any, target: Target
) -> Any:
    """The model; 4-bit weights come from the cache, or go into it."""
    if not _is_kept(paths, config, target):
        return _streamed_whole(source, paths, config, target)
    inputs = nf4_cache.cache_inputs(
        source, [*paths, folder / "config.json"], target.device, target.dtype, target.quantization
    )
    kept = nf4_cache.find_kept(target.cache, inputs)
    model = _from_cache(kept, config, target) if kept else None
    if model is None:
        model = _streamed_whole(source, paths, config, target)
        nf4_cache.keep(model, target.cache, inputs)
    return model


def _streamed_whole(source: str, paths: Sequence[Path], config: Any, target: Target) -> Any:
    model, info = _stream(paths, config, target)
    require_weights(source, model, info)
    return model


def require_weights(source: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights are drawn at random: the files lack them.

    A vision tower may lack its weights, since no text goes through it.

    Args:
        source: What the recipe calls the model.
        model: The loaded model.
        info: What transformers says of its loading.

    Raises:
        RecipeError: It names the weights.
    """
    outside = tuple(f"{name}." for name in outside_text(model))
    sides = {name: f" ({list(file)} in the file, {list(own)} in the model)"
             for name, file, own in info["mismatched_keys"]}  # fmt: skip
    drawn = {**dict.fromkeys(info["missing_keys"], ""), **sides}
    own = [n for n, _ in model.named_parameters() if n in drawn and not n.startswith(outside)]
    if own:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        head = model.get_output_embeddings()
        tied = head is not None and model.get_parameter(own[0]) is head.weight
        place = place_of(source)
        raise RecipeError(
            f"the files of {source} do not hold weights that its config.json describes:"
            f" {own[0]}{drawn[own[0]]}{more}",
            fix=f'"tie_word_embeddings": true in {place}, if the model was trained so'
            if tied and not sides
            else f"correct {place}, or download the model again",
        )


def _is_stored(config: Any) -> bool:
    """The checkpoint itself holds quantised weights."""
    return getattr(config, "quantization_config", None) is not None


def _is_kept(paths: Sequence[Path], config: Any, target: Target) -> bool:
    """Whether the result of quantising is worth its place on disk."""
    to_nf4 = target.quantization is not None and target.quantization.load_in_4bit
    size_bytes = sum(path.stat().st_size for path in paths)
    return to_nf4 and not _is_stored(config) and size_bytes >= nf4_cache.LEAST_BYTES


def _from_cache(kept: nf4_cache.CachedWeights, config: Any, target: Target) -> Any:
    """The model from weights that were kept; None if they are torn."""
    stored = copy.deepcopy(config)
    stored.quantization_config = target.quantization.to_dict()
    try:
        model, info = _stream(kept.paths, stored, target, kept.sums)
    except (DamagedError, StageError, OSError) as error:
        return nf4_cache.discard(kept.folder, str(error))
    is_whole = not (info["missing_keys"] or info["mismatched_keys"])
    return model if is_whole else nf4_cache.discard(kept.folder, "weights are missing")


def _stream(
    paths: Sequence[Path], config: Any, target: Target, sums: Sums | None = None
) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers says of its loading."""
    model_class, own = _class_of(config)
    with streaming(paths, target.device, sums) as tensors, nf4_cache.quiet():
        model, info = model_class.from_pretrained(
            None,
            config=own,
            state_dict=tensors,
            dtype=target.dtype,
            quantization_config=None if _is_stored(own) else target.quantization,
            device_map={"": target.device},
            attn_implementation=target.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
        )
    if _is_stored(own):
        _cast_rest(model, target.dtype)
    return model, info


def _cast_rest(model: Any, dtype: torch.dtype) -> None:
    """Give the weights that are not quantised the type of the run.

    transformers 5.23 leaves all weights of a quantised checkpoint in the type of the file
    (`HfQuantizer.get_new_dtype`).
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        is_packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if not is_packed and not any(module in name for module in kept):
            parameter.data = parameter.data.to(dtype)


def _class_of(config: Any) -> tuple[Any, Any]:
    """Which class transformers takes for a configuration, and the part of it that it takes."""
    with torch.device("meta"):
        shape = auto_class(config).from_config(copy.deepcopy(config))
    return type(shape), shape.config


def _use_generation_settings(model: Any, folder: Path) -> None:
    """What transformers reads from `generation_config.json` when it is given a name."""
    where = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
    model.adjust_generation_fn(
        None,
        True,
        None,
        str(folder),
        **where,
        force_download=False,
        local_files_only=True,
        subfolder="",
        trust_remote_code=False,
    )
