"""The 4-bit weights of a base, kept on disk: the next start reads less than a third.

<root>/<hash of the inputs>/   an ordinary checkpoint of 4-bit weights; manifest.json comes last
<root>/.writing                the next one; flushed before it gets its name

There is one entry for each base, device and type: a new one replaces the old one. All of it may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from strixft.model.files import sampled_hash, shard_paths
from strixft.model.stream import Checksums, checksums_of
from strixft.support.errors import StageError
from strixft.support.files import (
    folder_bytes,
    free_bytes,
    is_full,
    read_manifest,
    sync,
    write_manifest,
)
from strixft.support.locks import hold
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
