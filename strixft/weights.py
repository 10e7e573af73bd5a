"""The files of a base model: which they are, what they hold by hash, and none that runs code."""

from __future__ import annotations

import hashlib
from pathlib import Path

from strixft.errors import RecipeError

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole."""
SAMPLES = 256
SAMPLE_BYTES = 64 * 2**10
"""Of larger ones so many stretches of this size are hashed: 16 MiB of each."""
_READ = ("*.safetensors", "*.json", "*.jinja", "*.model")
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
    if folder is None or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        raise RecipeError(
            f"{pickles[0]} is a pickle, which can run code when it is read;"
            " only safetensors are loaded",
            fix="a version of the model with safetensors, or: "
            + _CONVERT.format(file=pickles[0], folder=folder),
        )
