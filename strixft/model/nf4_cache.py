"""The 4-bit weights of a base, kept on disk: the next start reads less than a third.

<folder>/<fingerprint>/   an ordinary checkpoint of 4-bit weights; manifest.json is written last
<folder>/.writing         the next one; flushed before it gets its name

There is one entry for each base, device and type: a new one replaces the old one. All of it may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from strixft.model.files import sampled_hash, shard_paths
from strixft.model.stream import Checksums, checksums_of
from strixft.support.disk import free_bytes, is_full, sync
from strixft.support.errors import StageError
from strixft.support.files import read_manifest, write_manifest
from strixft.support.locks import hold
from strixft.support.progress import say
from strixft.support.text import redact_all
from strixft.support.units import GIB, format_gib

FORMAT = 1
"""Version of the cache, counted up when its contents change."""

LEAST_BYTES = 2**30
"""Smaller checkpoints are quantised again each time: it takes a second or two."""

SPARE_BYTES = 10 * GIB
"""Disk space left for the run: prepared data, checkpoints, the report."""

FILE_BYTES = 10**9
"""Size of one file; as much is in host memory while it is written."""

Inputs = Mapping[str, Any]
"""Everything that 4-bit weights depend on."""


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """4-bit weights on disk."""

    folder: Path
    paths: list[Path]
    checksums: Checksums


def cache_inputs(
    source: str, paths: Sequence[Path], device: str, dtype: torch.dtype, quantization: Any
) -> Inputs:
    """Return everything that the 4-bit weights depend on.

    Args:
        source: Name of the model.
        paths: Its weights and `config.json`.
        device: Device that quantises them.
        dtype: Type of the weights before that.
        quantization: A `BitsAndBytesConfig`.
    """
    found = {
        "format": FORMAT,
        "model": source,
        "device": "hip" if torch.version.hip and device != "cpu" else device.partition(":")[0],
        "dtype": str(dtype),
        "quantization": quantization.to_dict(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("bitsandbytes", "transformers")
        },
        "files": {path.name: _identity(path) for path in paths},
    }
    plain: Inputs = redact_all(json.loads(json.dumps(found, default=str)))
    return plain


def _identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "changed_ns": stat.st_mtime_ns,
        "name": path.resolve().name,  # in the hub's cache the hash of the contents
        "hash": sampled_hash(path),
    }


def _folder_of(root: Path, inputs: Inputs) -> Path:
    text = json.dumps(inputs, sort_keys=True).encode()
    return root / hashlib.sha256(text).hexdigest()[:32]


def find_cached(root: Path, inputs: Inputs) -> CachedWeights | None:
    """Return the weights that were cached for these inputs; damaged ones are removed."""
    folder = _folder_of(root, inputs)
    if not folder.is_dir():
        return None
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, OSError) as fault:
        discard(folder, str(fault))
        return None


def _read(folder: Path) -> CachedWeights:
    files = read_manifest(folder)["files"]
    checksums: dict[str, int] = {}
    for name, listed in files.items():
        if (folder / name).stat().st_size != listed["bytes"]:
            raise ValueError(f"{name} has another size than was written")
        checksums |= listed["sums"]
    paths = shard_paths(folder)
    if {path.name for path in paths} != set(files):
        raise ValueError("there are other files than were written")
    return CachedWeights(folder, paths, checksums)


def discard(folder: Path, fault: str) -> None:
    """Remove damaged weights and say so."""
    shutil.rmtree(folder, ignore_errors=True)
    say(f"the cached 4-bit weights in {folder} are damaged ({fault}): quantising again")


def keep(model: Any, root: Path, inputs: Inputs) -> None:
    """Write the weights of a model that has just been quantised if the disk has room for them.

    Args:
        model: As transformers loaded it.
        root: Folder of the cache.
        inputs: As `cache_inputs` returned them.
    """
    needed = sum(value.nbytes for value in model.state_dict().values()) + SPARE_BYTES
    try:
        root.mkdir(parents=True, exist_ok=True)
        if free_bytes(root) < needed:
            return say(
                f"4-bit weights are not cached: {root} has {format_gib(free_bytes(root))} left,"
                f" and {format_gib(needed)} are needed"
            )
        with contextlib.suppress(StageError), hold(root / ".lock", root, 0):
            _write(model, root, inputs)  # a process that holds the lock caches its own
    except Exception as error:  # safetensors has errors of its own for a full disk
        if not (isinstance(error, OSError | NotImplementedError) or is_full(error, root)):
            raise  # not implemented: names that transformers cannot turn back
        say(f"4-bit weights are not cached: {root} cannot be written ({error!r})")


def _write(model: Any, root: Path, inputs: Inputs) -> None:
    temporary, folder = root / ".writing", _folder_of(root, inputs)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    if folder.is_dir():
        return
    try:
        _save(model, temporary)
        files: dict[str, dict[str, Any]] = {}
        for path in shard_paths(temporary):
            sync(path)  # reading it afterwards takes it out of the page cache
            files[path.name] = {"bytes": path.stat().st_size, "sums": checksums_of(path)}
        write_manifest(temporary, {"inputs": inputs, "files": files})
        sync(temporary)
        temporary.rename(folder)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total = sum(row["bytes"] for row in files.values())
    say(f"4-bit weights cached for the next start: {format_gib(total)} in {folder}")
    _remove_replaced(root, folder, inputs)


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


def _remove_replaced(root: Path, newest: Path, inputs: Inputs) -> None:
    """Remove entries for the same model, device and type: nothing can use them again."""
    for folder in root.iterdir():
        if folder == newest or not folder.is_dir():
            continue
        try:
            before = read_manifest(folder)["inputs"]
            replaced = all(before[key] == inputs[key] for key in ("model", "device", "dtype"))
        except (ValueError, KeyError, TypeError):
            replaced = True
        if replaced:
            shutil.rmtree(folder, ignore_errors=True)


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
