"""Disk space: the cache folder, the free space, and the errors of a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from strixft.support.errors import HostError, StrixftError
from strixft.support.text import typed
from strixft.support.units import format_gib

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


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
