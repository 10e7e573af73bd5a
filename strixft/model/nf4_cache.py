"""The 4-bit weights of a base, kept on disk: the next start reads less than a third.

<folder>/<fingerprint>/   an ordinary checkpoint of 4-bit weights; manifest.json is written last
<folder>/.writing         the next one; flushed before it gets its name

Of each base there is one for each device and type: a new one replaces what was there. All of it may
be deleted at any time.
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
from torch import nn

from strixft.model.files import sampled_hash, shard_paths
from strixft.model.stream import Sums, sums_of
from strixft.support.disk import free_bytes, is_full, sync
from strixft.support.errors import StageError
from strixft.support.files import read_manifest, write_manifest
from strixft.support.locks import hold
from strixft.support.progress import say
from strixft.support.text import redact_all
from strixft.support.units import GIB, format_gib

FORMAT = 1
"""Of this cache: counted up when what is written changes."""

LEAST_BYTES = 2**30
"""Smaller checkpoints are quantised again each time: it takes a second or two."""

SPARE_BYTES = 10 * GIB
"""Left for the run: prepared data, checkpoints, the report."""

FILE_BYTES = 10**9
"""Of one file; as much is in host memory while it is written."""

_WRITING, _LOCK = ".writing", ".lock"

_SAME = ("model", "device", "dtype")
"""Of two entries that agree in these, the older one can never be used again."""


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """Weights that were kept."""

    folder: Path
    paths: list[Path]
    sums: Sums
    """CRC-32 of each tensor."""


def _mark(path: Path) -> dict[str, Any]:
    """What is compared of a file: any change of it that leaves all of these alone is not seen.

    The name behind a link is the hash of the contents where the file lies in the hub's cache.
    """
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "changed_ns": stat.st_mtime_ns,
        "name": path.resolve().name,
        "hash": sampled_hash(path),
    }


def cache_inputs(
    source: str, paths: Sequence[Path], device: str, dtype: torch.dtype, quantization: Any
) -> dict[str, Any]:
    """All that the 4-bit weights depend on.

    Args:
        source: Name of the model.
        paths: Its weights and `config.json`.
        device: Where they are quantised.
        dtype: What the weights are turned to before.
        quantization: A `BitsAndBytesConfig`.
    """
    found = {
        "format": FORMAT,
        "model": source,
        "device": "hip" if torch.version.hip and device != "cpu" else device.partition(":")[0],
        "dtype": str(dtype),
        "quantization": quantization.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "files": {path.name: _mark(path) for path in paths},
    }
    plain: dict[str, Any] = redact_all(json.loads(json.dumps(found, default=str)))
    return plain


_PACKAGES = ("bitsandbytes", "transformers")


def _folder_of(root: Path, inputs: Mapping[str, Any]) -> Path:
    text = json.dumps(inputs, sort_keys=True).encode()
    return root / hashlib.sha256(text).hexdigest()[:32]


def find_kept(root: Path, inputs: Mapping[str, Any]) -> CachedWeights | None:
    """Weights that were kept for the same inputs; torn ones are removed."""
    folder = _folder_of(root, inputs)
    if not folder.is_dir():
        return None
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, OSError) as fault:
        discard(folder, str(fault))
        return None


def _read(folder: Path) -> CachedWeights:
    manifest = read_manifest(folder)
    sums: dict[str, int] = {}
    for name, listed in manifest["files"].items():
        if (folder / name).stat().st_size != listed["bytes"]:
            raise ValueError(f"{name} is not as long as it was written")
        sums |= listed["sums"]
    paths = shard_paths(folder)
    if {path.name for path in paths} != set(manifest["files"]):
        raise ValueError("other files are there than were written")
    return CachedWeights(folder, paths, sums)


def discard(folder: Path, fault: str) -> None:
    """Remove what is torn, and say so."""
    shutil.rmtree(folder, ignore_errors=True)
    say(f"4-bit weights in {folder} were torn ({fault}): removed, and made again")


def _held_bytes(model: nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def keep(model: nn.Module, root: Path, inputs: Mapping[str, Any]) -> None:
    """Write the weights of a model that has just been quantised, if there is room.

    Args:
        model: As transformers loaded it.
        root: Folder of the cache.
        inputs: As `cache_inputs` gives them.
    """
    needed = _held_bytes(model)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if free_bytes(root) < needed + SPARE_BYTES:
            return say(
                f"4-bit weights are not kept: {format_gib(free_bytes(root))} left for {root},"
                f" and {format_gib(needed + SPARE_BYTES)} are asked for"
            )
        with contextlib.suppress(StageError), hold(root / _LOCK, root, 0):
            _write(model, root, inputs)  # where another process holds the lock, it keeps its own
    except Exception as error:  # safetensors has errors of its own for a full disk
        if not (isinstance(error, OSError | NotImplementedError) or is_full(error, root)):
            raise  # not implemented: names that transformers cannot turn back
        say(f"4-bit weights are not kept: {root} cannot be written ({error!r})")


def _write(model: nn.Module, root: Path, inputs: Mapping[str, Any]) -> None:
    temporary, folder = root / _WRITING, _folder_of(root, inputs)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    if folder.is_dir():
        return
    try:
        _save(model, temporary)
        files = {path.name: _written(path) for path in shard_paths(temporary)}
        write_manifest(temporary, {"inputs": inputs, "files": files})
        sync(temporary)
        temporary.rename(folder)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total = sum(row["bytes"] for row in files.values())
    say(f"4-bit weights kept for the next start: {format_gib(total)} in {folder}")
    _remove_replaced(root, folder, inputs)


def _save(model: Any, folder: Path) -> None:
    """What transformers writes, without settings of generation, which it may refuse to write."""
    from transformers import GenerationConfig

    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, max_shard_size=FILE_BYTES)
    finally:
        model.generation_config = generation


def _written(path: Path) -> dict[str, Any]:
    """Flush a file; its size and sums. Reading it takes it out of the page cache."""
    sync(path)
    return {"bytes": path.stat().st_size, "sums": sums_of(path)}


def _remove_replaced(root: Path, newest: Path, inputs: Mapping[str, Any]) -> None:
    for folder in root.iterdir():
        if folder == newest or not folder.is_dir():
            continue
        try:
            before = read_manifest(folder)["inputs"]
            replaced = all(before[name] == inputs[name] for name in _SAME)
        except (ValueError, KeyError, TypeError):
            replaced = True
        if replaced:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which count tensors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
