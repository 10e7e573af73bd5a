"""The weights of a base model, from disk to a device.

transformers builds the model, matches names, converts, quantises and ties; it takes each tensor
when it needs it. This module gives it tensors that are read at that moment, so that the host holds
a few pieces of a file and the device one tensor as stored, and caches the 4-bit result on disk.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strixft.attention.interface import NAME
from strixft.model import nf4_cache
from strixft.model.architecture import auto_class, outside_text
from strixft.model.config import place_of
from strixft.model.files import shard_paths
from strixft.model.stream import DTYPES, Checksums, Shard, streaming
from strixft.support.errors import RecipeError
from strixft.support.files import cache_folder
from strixft.support.private_hf import kept_in_float32
from strixft.support.progress import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A base model that is to be loaded."""

    source: str
    """A folder or a hub id."""
    folder: Path | None
    """Its files, where they are on this machine."""
    config: Any
    device: str
    dtype: torch.dtype
    quantization: Any
    """A `BitsAndBytesConfig` for weights that are to be quantised, or None."""
    offline: bool = False
    trust_remote_code: bool = False

    def run(self) -> Any:
        """Load the model, streamed from its files or from cached 4-bit weights.

        Where only transformers itself can load it, a line says why.

        Raises:
            RecipeError: The files lack weights that the configuration describes.
            StageError: A file is damaged.
        """
        from transformers import GenerationConfig

        paths = shard_paths(self.folder) if self.folder else []
        hindrance = _hindrance(self.folder, paths, self.config)
        if self.folder is None or hindrance:
            say(f"transformers loads the weights without streaming: {hindrance}")
            return self._by_transformers()
        is_large = sum(path.stat().st_size for path in paths) >= nf4_cache.LEAST_BYTES
        kind = None if _is_quantised(self.config) else self.quantization
        if is_large and kind is not None and kind.load_in_4bit:
            model = self._through_cache(paths, self.folder)
        else:
            model = self._from_files(paths)
        model.config.name_or_path = model.name_or_path = self.source  # PEFT writes the second down
        with contextlib.suppress(OSError):  # without the file, those of the configuration stay
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model

    def _through_cache(self, paths: Sequence[Path], folder: Path) -> Any:
        cache = nf4_cache.Nf4Cache(
            cache_folder() / "nf4",
            [*paths, folder / "config.json"],
            self.device,
            model=self.source,
            dtype=str(self.dtype),
            quantization=self.quantization.to_dict(),
        )
        stored = copy.deepcopy(self.config)
        stored.quantization_config = self.quantization.to_dict()

        def from_cache(kept: Sequence[Path], checksums: Checksums) -> Any:
            model, info = self._stream(kept, stored, checksums)
            if info["missing_keys"] or info["mismatched_keys"]:
                raise ValueError("weights are missing")
            return model

        model = cache.load(from_cache)
        if model is None:
            model = self._from_files(paths)
            cache.keep(model)
        return model

    def _from_files(self, paths: Sequence[Path]) -> Any:
        model, info = self._stream(paths, self.config)
        _require_weights(self.source, model, info)
        return model

    def _stream(
        self, paths: Sequence[Path], config: Any, checksums: Checksums | None = None
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return a model and the report of transformers about its loading."""
        with torch.device("meta"):  # the class that transformers chooses, its part of the config
            shape = auto_class(config).from_config(copy.deepcopy(config))
        with streaming(paths, self.device, checksums) as tensors, nf4_cache.without_bars():
            return self._load(type(shape), None, config=shape.config, state_dict=tensors)

    def _by_transformers(self) -> Any:
        model, info = self._load(
            auto_class(self.config),
            self.source,
            local_files_only=self.offline,
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
        )
        _require_weights(self.source, model, info)
        return model

    def _load(
        self, cls: Any, source: str | None, config: Any = None, **more: Any
    ) -> tuple[Any, Mapping[str, Any]]:
        is_quantised = _is_quantised(config or self.config)
        model, info = cls.from_pretrained(
            source,
            config=config,
            dtype=self.dtype,
            quantization_config=None if is_quantised else self.quantization,
            device_map={"": self.device},
            attn_implementation=NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
            **more,
        )
        if is_quantised:
            _cast_rest(model, self.dtype)
        return model, info


def _is_quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


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


def _require_weights(source: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model with randomly initialised weights, because its files lack them.

    A vision tower may lack its weights: no text goes through it.

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


def _cast_rest(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantised to the type of the run.

    transformers 5.23 leaves all weights of a quantised checkpoint in the type of the file.
    """
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        is_packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if not is_packed and not any(module in name for module in kept):
            parameter.data = parameter.data.to(dtype)
