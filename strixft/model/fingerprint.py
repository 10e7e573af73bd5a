"""The files of a base model: which they are, what they hold by hash, and none that runs code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from strixft.support.errors import RecipeError

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""

SAMPLES = 256

SAMPLE_BYTES = 64 * 2**10
"""Of larger ones so many stretches of this size are hashed: 16 MiB of each."""

_READ = ("*.safetensors", "*.json", "*.jinja", "*.model")

BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "merges.*", "vocab.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What belongs to a model beside its weights: settings, tokenizer, templates, its own code."""

_NOT_BESIDE = ("*.index.json", "adapter_config.json")

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_CONVERT = (
    """python -c "import torch, safetensors.torch as s; """
    """w = torch.load('{file}', weights_only=True); """
    """s.save_file({{k: v.clone() for k, v in w.items()}}, '{folder}/model.safetensors', """
    """{{'format': 'pt'}})\""""
)


def model_folder(source: str) -> Path | None:
    """Where a model's files lie on this machine: its folder, or its snapshot in the hub's cache.

    Args:
        source: A folder or a hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    try:
        found = try_to_load_from_cache(source, "config.json")
    except ValueError:  # neither a folder nor a name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def shard_paths(folder: Path) -> list[Path]:
    """Return the files with the weights of a model; none where they have other names than usual.

    Weights of another format or of another tool may lie beside them, such as
    `consolidated.safetensors`: they are never read.

    Args:
        folder: Of the model.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else []


def beside_weights(folder: Path) -> list[Path]:
    """Return the files of a model that are taken along with its weights.

    Args:
        folder: Of the model.
    """
    found = {path for kind in BESIDE for path in folder.glob(kind) if path.is_file()}
    code = (path.relative_to(folder) for path in folder.rglob("*.py"))
    found |= {folder / path for path in code if not any(p.startswith(".") for p in path.parts)}
    return sorted(path for path in found if not any(map(path.match, _NOT_BESIDE)))


def sampled_hash(path: Path) -> str:
    """SHA-256 of a file; of a large one, of stretches spread over it."""
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
    """Each file of a base model and its hash; large files by samples spread over them.

    Training changes every weight, so another base shows in any sample.

    Args:
        source: A folder or a hub id; one that is not on this machine has no files.
    """
    folder = model_folder(source)
    paths = sorted(path for kind in _READ for path in folder.glob(kind)) if folder else []
    return {path.name: sampled_hash(path) for path in paths}


def refuse_pickles(source: str) -> None:
    """Refuse a model whose weights are only there as pickle, which runs code when it is read.

    Raises:
        RecipeError: With a command that converts them without running any.
    """
    folder = model_folder(source)
    if folder is None or shard_paths(folder):
        return
    pickles = sorted(path for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise RecipeError(
            f"{pickles[0]} is a pickle, which can run code when it is read;"
            " only safetensors are loaded",
            fix="a version of the model with safetensors, or: "
            + _CONVERT.format(file=pickles[0], folder=folder),
        )
