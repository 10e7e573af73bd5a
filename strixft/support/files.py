"""Write files that are complete or absent, and hash them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from strixft.support.text import redact_all

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
    "flash-attn-4",
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
