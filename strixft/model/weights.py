"""The weights of a base model, from disk to a device.

transformers builds the model, matches names, converts, quantises and ties; it takes each tensor
when it needs it. This module gives it tensors that are read at that moment, so that the host holds
a few pieces of a file and the device one tensor as stored, and caches the 4-bit result on disk.

The 4-bit weights of a base are kept on disk, so that the next start reads less than a third:

<root>/<hash of the inputs>/   an ordinary checkpoint of 4-bit weights; manifest.json comes last
<root>/.writing                the next one; flushed before it gets its name

There is one entry for each base, device and type: a new one replaces the old one. All of it may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strixft.attention.interface import call_ours
from strixft.model.architecture import auto_class, drop_tower, outside_text, text_only
from strixft.model.config import is_in_mxfp4, place_of
from strixft.model.experts import call_routed
from strixft.model.files import sampled_hash, shard_paths
from strixft.model.packing import mxfp4_as_stored, pack_while_read, packing
from strixft.model.stream import DTYPES, Checksums, Shard, checksums_of, streaming
from strixft.support.errors import RecipeError, StageError
from strixft.support.files import (
    cache_folder,
    folder_bytes,
    free_bytes,
    is_full,
    read_manifest,
    sync,
    write_manifest,
)
from strixft.support.locks import hold
from strixft.support.private_hf import kept_in_float32
from strixft.support.progress import say
from strixft.support.text import redact_all
from strixft.support.units import GIB, format_gib

FORMAT = 2
"""Version of the cache, counted up when its contents change."""

LEAST_BYTES = 2**30
"""Smaller checkpoints are quantised again each time: it takes a second or two."""

SPARE_BYTES = 10 * GIB
"""Disk space left for the run: prepared data, checkpoints, the report."""

FILE_BYTES = 10**9
"""Size of one file; as much is in host memory while it is written."""


class Nf4Cache:
    """The entry for the 4-bit weights of one model on one kind of device.

    Args:
        root: Folder of all entries.
        paths: Weights of the model and `config.json`.
        device: Device that quantises them.
        inputs: What else they depend on: `model` and `dtype` among it.
    """

    def __init__(self, root: Path, paths: Sequence[Path], device: str, **inputs: Any) -> None:
        everything = {
            **inputs,
            "format": FORMAT,
            "device": "hip" if torch.version.hip and device != "cpu" else device.partition(":")[0],
            "versions": {
                name: importlib.metadata.version(name) for name in ("bitsandbytes", "transformers")
            },
            "files": {path.name: _identity(path) for path in paths},
        }
        self._inputs = redact_all(json.loads(json.dumps(everything, default=str)))
        text = json.dumps(self._inputs, sort_keys=True).encode()
        self._root, self._folder = root, root / hashlib.sha256(text).hexdigest()[:32]

    def load(self, stream: Callable[[list[Path], Checksums], Any]) -> Any:
        """Return what `stream` makes of the kept files and checksums; None if there are none.

        Damaged ones are removed, with a line that says so.
        """
        if not self._folder.is_dir():
            return None
        try:
            checksums, paths = read_manifest(self._folder)["checksums"], shard_paths(self._folder)
            if not paths:
                raise ValueError("the weights are missing")
            return stream(paths, checksums)
        except (StageError, ValueError, KeyError, TypeError, OSError) as fault:
            shutil.rmtree(self._folder, ignore_errors=True)
            return say(
                f"the cached 4-bit weights in {self._folder} are damaged ({fault}):"
                " quantising again"
            )

    def keep(self, model: Any) -> None:
        """Write the weights of a model that was just quantised, if the disk has room for them."""
        root = self._root
        needed = sum(value.nbytes for value in model.state_dict().values()) + SPARE_BYTES
        try:
            root.mkdir(parents=True, exist_ok=True)
            if free_bytes(root) < needed:
                return say(
                    f"4-bit weights are not cached: {root} has {format_gib(free_bytes(root))}"
                    f" left, and {format_gib(needed)} are needed"
                )
            with contextlib.suppress(StageError), hold(root / ".lock", root, 0):
                self._write(model)  # a process that holds the lock caches its own
        except Exception as error:  # safetensors has errors of its own for a full disk
            if not (isinstance(error, OSError | NotImplementedError) or is_full(error, root)):
                raise  # not implemented: names that transformers cannot turn back
            say(f"4-bit weights are not cached: {root} cannot be written ({error!r})")

    def _write(self, model: Any) -> None:
        temporary = self._root / ".writing"
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        if self._folder.is_dir():
            return
        try:
            _save(model, temporary)
            checksums: dict[str, int] = {}
            for path in shard_paths(temporary):
                sync(path)  # reading it afterwards takes it out of the page cache
                checksums |= checksums_of(path)
            write_manifest(temporary, {"inputs": self._inputs, "checksums": checksums})
            sync(temporary)
            temporary.rename(self._folder)
            sync(self._root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        total = format_gib(folder_bytes(self._folder))
        say(f"4-bit weights cached for the next start: {total} in {self._folder}")
        for folder in self._root.iterdir():
            if folder.is_dir() and folder != self._folder and self._replaces(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _replaces(self, folder: Path) -> bool:
        """Return whether nothing can use an entry again, once this one is there."""
        try:
            before = read_manifest(folder)["inputs"]
            return all(before[key] == self._inputs[key] for key in ("model", "device", "dtype"))
        except (ValueError, KeyError, TypeError):
            return True


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "changed_ns": stat.st_mtime_ns,
        "name": path.resolve().name,  # in the hub's cache the hash of the contents
        "hash": sampled_hash(path),
    }


def _save(model: Any, folder: Path) -> None:
    """Save without generation settings, which transformers may refuse to write."""
    from transformers import GenerationConfig

    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with without_bars():
            model.save_pretrained(folder, max_shard_size=FILE_BYTES)
    finally:
        model.generation_config = generation


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Turn off transformers' own progress bars, which count tensors, while a block runs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
    unpack: bool = False
    """Experts that are stored in MXFP4 are written out."""
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
        is_large = sum(path.stat().st_size for path in paths) >= LEAST_BYTES
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
        cache = Nf4Cache(
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
        kind = built = text_only(shape)
        with streaming(paths, self.device, checksums) as read, without_bars():
            tensors: Mapping[str, Any] = read
            if is_in_mxfp4(config):
                built = kind if self.unpack else packing(kind, self.dtype, "mxfp4")
                tensors = mxfp4_as_stored(read, shape, self.dtype, unpack=self.unpack)
                del shape.config.quantization_config  # else transformers would unpack them itself
            elif self._is_nf4(config):
                built, tensors = packing(kind, self.dtype), pack_while_read(read, shape)
            model, info = self._load(built, None, config=shape.config, state_dict=tensors)
        model.__class__ = kind
        return model, info

    def _is_nf4(self, config: Any) -> bool:
        """Return whether the base is kept in 4 bits."""
        stored = getattr(config, "quantization_config", None) or {}
        return bool(getattr(self.quantization, "load_in_4bit", stored.get("load_in_4bit")))

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
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
            **more,
        )
        drop_tower(model)
        call_ours(model)
        call_routed(model)
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
        others = sorted(info["unexpected_keys"])
        instead = f"; no part of a {type(model).__name__} is {others[0]}" if others else ""
        raise RecipeError(
            f"the files of {source} do not hold weights that its config.json describes:"
            f" {own[0]}{drawn[own[0]]}{more}{instead}",
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
