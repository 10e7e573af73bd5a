"""The weights of a base model, from disk to a device.

transformers builds the model, matches names, converts, quantises and ties; it takes each tensor
when it needs it. This module gives it tensors that are read at that moment, so that the host holds
a few pieces of a file and the device one tensor as stored, and caches the 4-bit result on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strixft.model import nf4_cache
from strixft.model.architecture import auto_class, outside_text
from strixft.model.config import place_of
from strixft.model.files import shard_paths
from strixft.model.stream import DTYPES, Checksums, DamagedError, Shard, streaming
from strixft.support.errors import RecipeError, StageError
from strixft.support.progress import say

Info = Mapping[str, Any]
"""The report of transformers about its loading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Device, types and storage of a model that is loaded."""

    device: str
    dtype: torch.dtype
    quantization: Any
    """A `BitsAndBytesConfig`, or None."""
    attention: str
    """Name of an attention function in transformers."""
    cache: Path
    """Folder of the cached 4-bit weights."""


def load_weights(source: str, folder: Path | None, config: Any, target: Target) -> Any:
    """Load a base model, streamed from its files or from cached 4-bit weights.

    Args:
        source: The model's name in the recipe.
        folder: Its files.
        config: Its configuration.
        target: Device, type and storage.

    Returns:
        None if only transformers itself can load it, after telling the reason in one line.

    Raises:
        RecipeError: The files lack weights that the configuration describes.
        StageError: A file is damaged.
    """
    paths = shard_paths(folder) if folder else []
    hindrance = _hindrance(folder, paths, config)
    if folder is None or hindrance:
        say(f"transformers loads the weights without streaming: {hindrance}")
        return None
    if _is_cacheable(paths, config, target):
        files = [*paths, folder / "config.json"]
        inputs = nf4_cache.cache_inputs(
            source, files, target.device, target.dtype, target.quantization
        )
        cached = nf4_cache.find_cached(target.cache, inputs)
        model = _from_cache(cached, config, target) if cached else None
        if model is None:
            model = _from_files(source, paths, config, target)
            nf4_cache.keep(model, target.cache, inputs)
    else:
        model = _from_files(source, paths, config, target)
    model.config.name_or_path = model.name_or_path = source  # PEFT writes the second down
    _use_generation_settings(model, folder)
    return model


def _hindrance(folder: Path | None, paths: Sequence[Path], config: Any) -> str | None:
    """Return the reason that a model cannot be streamed, or None."""
    if getattr(config, "auto_map", None):
        return "the model comes with code of its own"
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return "its files have unusual names"
    if folder is None or not paths:
        return "there is neither model.safetensors nor its index"
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds an adapter"
    for path in paths:
        with Shard(path) as shard:
            unknown = {entry.dtype for entry in shard.entries.values()} - DTYPES.keys()
        if unknown:
            return f"{path.name} holds numbers of type {min(unknown)}"
    return None


def _is_quantised(config: Any) -> bool:
    """Return whether the checkpoint itself holds quantised weights."""
    return getattr(config, "quantization_config", None) is not None


def _is_cacheable(paths: Sequence[Path], config: Any, target: Target) -> bool:
    """Return whether the result of quantising is worth its disk space."""
    to_nf4 = target.quantization is not None and target.quantization.load_in_4bit
    size_bytes = sum(path.stat().st_size for path in paths)
    return to_nf4 and not _is_quantised(config) and size_bytes >= nf4_cache.LEAST_BYTES


def _from_files(source: str, paths: Sequence[Path], config: Any, target: Target) -> Any:
    model, info = _stream(paths, config, target)
    require_weights(source, model, info)
    return model


def _from_cache(cached: nf4_cache.CachedWeights, config: Any, target: Target) -> Any:
    """Load cached weights; remove them and return None if they are damaged."""
    stored = copy.deepcopy(config)
    stored.quantization_config = target.quantization.to_dict()
    try:
        model, info = _stream(cached.paths, stored, target, cached.checksums)
    except (DamagedError, StageError, OSError) as error:
        return nf4_cache.discard(cached.folder, str(error))
    is_whole = not (info["missing_keys"] or info["mismatched_keys"])
    return model if is_whole else nf4_cache.discard(cached.folder, "weights are missing")


def require_weights(source: str, model: Any, info: Info) -> None:
    """Refuse a model with randomly initialised weights, because its files lack them.

    A vision tower may lack its weights: no text goes through it.

    Args:
        source: The model's name in the recipe.
        model: The loaded model.
        info: The report of transformers about its loading.

    Raises:
        RecipeError: With the names of the weights.
    """
    outside = tuple(f"{name}." for name in outside_text(model))
    mismatched = {
        name: f" ({list(file)} in the file, {list(own)} in the model)"
        for name, file, own in info["mismatched_keys"]
    }
    drawn = {**dict.fromkeys(info["missing_keys"], ""), **mismatched}
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
            if tied and not mismatched
            else f"correct {place}, or download the model again",
        )


def _stream(
    paths: Sequence[Path], config: Any, target: Target, checksums: Checksums | None = None
) -> tuple[Any, Info]:
    with torch.device("meta"):  # the class that transformers chooses, and its part of the config
        shape = auto_class(config).from_config(copy.deepcopy(config))
    quantised = _is_quantised(shape.config)
    with streaming(paths, target.device, checksums) as tensors, nf4_cache.without_bars():
        model, info = type(shape).from_pretrained(
            None,
            config=shape.config,
            state_dict=tensors,
            dtype=target.dtype,
            quantization_config=None if quantised else target.quantization,
            device_map={"": target.device},
            attn_implementation=target.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
        )
    if quantised:
        _cast_rest(model, target.dtype)
    return model, info


def _cast_rest(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantised to the type of the run.

    transformers 5.23 leaves all weights of a quantised checkpoint in the type of the file
    (`HfQuantizer.get_new_dtype`).
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        is_packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if not is_packed and not any(module in name for module in kept):
            parameter.data = parameter.data.to(dtype)


def _use_generation_settings(model: Any, folder: Path) -> None:
    """Read `generation_config.json` as `from_pretrained` does when it is given a folder."""
    unused = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
    switches = dict.fromkeys(("force_download", "trust_remote_code"), False)
    model.adjust_generation_fn(
        None, True, None, str(folder), local_files_only=True, subfolder="", **unused, **switches
    )
