"""The files of a model of the hub: what is missing is downloaded, if there is room for it.

What the hub's library has downloaded stays. huggingface_hub 2 goes on within a file when a
connection breaks, and with the file that was not whole when the process was stopped; versions
before end at a broken connection, and the next start goes on within the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from strixft.model.fingerprint import BESIDE, model_folder
from strixft.support.disk import disk_full, free_bytes
from strixft.support.errors import HostError

SETTINGS = (*BESIDE, "README.md")
"""Small files: an export takes them along, and the model card names the licence."""

INDEX = "model.safetensors.index.json"

SPARE_BYTES = 2**30


def fetch(source: str, *, offline: bool) -> Path | None:
    """The folder with a model's weights.

    Args:
        source: A folder or a hub id.
        offline: Never ask the network.

    Returns:
        None where there is none on this machine, and none may be fetched.

    Raises:
        HostError: The disk has no room for what is missing, or the connection broke.
        OSError: There is no such model, or it is not open to this user.
    """
    from huggingface_hub import is_offline_mode

    if Path(source).is_dir() or offline or is_offline_mode():
        return model_folder(source)
    folder = _download(source, [*SETTINGS, INDEX])
    names = _weight_names(folder)
    if all((folder / name).exists() for name in names):
        return folder
    _require_room(source, names)
    return _download(source, [*SETTINGS, INDEX, *names])


def _download(source: str, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(names)))
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the HTTP client, which is another one in each version
        raise HostError(
            f"the download of {source} broke off: {error}",
            fix="type the same command again: what is there stays",
        ) from error


def _weight_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _require_room(source: str, names: Sequence[str]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    files = snapshot_download(source, allow_patterns=list(names), dry_run=True)
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(HF_HUB_CACHE)
    if missing and free_bytes(cache) < missing + SPARE_BYTES:
        raise disk_full(cache, missing + SPARE_BYTES)
