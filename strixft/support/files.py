"""Write files that are complete or absent, hash them, and tell when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from strixft.support.errors import HostError, StrixftError
from strixft.support.text import redact_all, typed
from strixft.support.units import format_gib

MANIFEST = "manifest.json"


def own_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the list of a folder's contents, with a hash of the list itself."""
    write_json(folder / MANIFEST, {"sha256": own_hash(manifest), **manifest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the list of a folder's contents.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        whole = manifest.pop("sha256") == own_hash(manifest)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, OSError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


PACKAGES = (
    *("strixft", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"),
    *("flash-attn-4", "flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)

_TEMPORARY = re.compile(r"\..+\.(\d+)(\.ipynb)?")


def now() -> str:
    """Return the UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: Path, data: Mapping[str, Any], *, flush: bool = True) -> None:
    """Write a mapping as JSON without its secrets; see `write_text`."""
    text = json.dumps(redact_all(data), indent=2, ensure_ascii=False)
    write_text(path, f"{text}\n", flush=flush)


def temporary_name(path: Path) -> Path:
    """Return the path to write to before the rename to `path`.

    It ends in the number of this thread, which `/proc` lists as it lists processes.
    """
    return path.with_name(f".{path.name}.{threading.get_native_id()}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for path in folder.rglob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_file() and not Path("/proc", match[1]).exists():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write by rename, so that a reader sees the old file or the complete new one.

    Args:
        path: The file.
        text: Its complete text.
        flush: Wait for the disk before the rename; the file then survives a power cut.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _digest_of_version(path: Path, size: int, changed_ns: int) -> str:
    return digest(path)


def known_digest(path: Path) -> str:
    """Return the SHA-256 of a file, computed again only after the file has changed."""
    stat = path.stat()
    return _digest_of_version(path, stat.st_size, stat.st_mtime_ns)


def versions() -> dict[str, str]:
    """Return the installed versions that a result depends on, Python's included."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def free_aside(folder: Path) -> Path:
    """Return the first of `<folder>.1`, `<folder>.2`, … that does not exist."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


_FULL = (errno.ENOSPC, errno.EDQUOT)

_WORDS = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")
"""Messages of libraries that are not written in Python (safetensors 0.7, torch 2.13)."""

NOTHING_BYTES = 2**20
"""With less than this left, any unexpected error is put down to the full disk."""


def cache_folder() -> Path:
    """Return the folder for files that can be made again: `$STRIXFT_CACHE`, or `~/.cache/strixft`.

    Raises:
        HostError: A file is in the way.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("STRIXFT_CACHE") or Path(cache, "strixft"))
    there = next(path for path in (root, *root.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise HostError(
            f"the cache {root} is not a folder: {there} is a file",
            fix="export STRIXFT_CACHE=…   with a folder that can be written",
        )
    return root


def free_bytes(folder: Path) -> int:
    """Return the number of bytes that this user may still write there."""
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Return the size of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_full(error: BaseException, folder: Path) -> bool:
    """Return whether an error means that the disk of a folder is full."""
    if isinstance(error, StrixftError):
        return False
    if free_bytes(folder) < NOTHING_BYTES:  # torch then also says "unexpected pos 64 vs 0"
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error) for words in _WORDS)


def disk_full(folder: Path, needed_bytes: int | None = None) -> HostError:
    """Build the error of a full disk.

    Args:
        folder: The folder to write to.
        needed_bytes: The space that the files need, if it is known.
    """
    left = format_gib(free_bytes(folder))
    needed = f", and {format_gib(needed_bytes)} are needed" if needed_bytes else ""
    return HostError(
        f"the disk of {folder} is full: {left} left{needed}; files saved before are intact",
        fix=f"df -h {typed(folder)}; make room, then run the same command again",
    )


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raise an error if too little space is left.

    Raises:
        HostError: Fewer bytes are left than needed.
    """
    if free_bytes(folder) < needed_bytes:
        raise disk_full(folder, needed_bytes)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to; it is flushed, and takes the place of an older one."""
    temporary, old = folder.with_name(f".{folder.name}"), folder.with_name(f".{folder.name}.old")
    for left in (temporary, old):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    if folder.is_dir():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
