"""`MAKE`: how each kind of export is made of a trained run."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.data.ends import Ends
from strixft.disk import folder_bytes
from strixft.export import gguf, texts
from strixft.export.candidates import compare_merges
from strixft.export.merge import merge
from strixft.exports import QUANTISATIONS
from strixft.methods import METHODS, Method
from strixft.model import load_tokenizer
from strixft.prepare import Prepared
from strixft.runs import Run, write_text

MERGED = "merged"
STORED = {"original": "original weights", "dequantised": "as stored in training"}
"""Which base the merged model has, in words."""
Made = dict[str, Any]


def plain(name: str) -> str:
    """A name that servers take.

    >>> plain("my run/2")
    'my-run-2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


@dataclass(frozen=True)
class Job:
    """One export of one run."""

    run: Run
    folder: Path
    base_folder: Path
    adapter: Path

    @property
    def method(self) -> Method:
        """How the run was trained."""
        return METHODS[self.run.recipe.method]

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.folder / MERGED

    @property
    def lora_path(self) -> Path:
        """The adapter's own GGUF file."""
        return self.folder / f"{plain(self.run.name)}-lora-f16.gguf"

    def gguf_path(self, kind: str) -> Path:
        """A GGUF file of the merged model."""
        return self.folder / f"{plain(self.run.name)}-{kind}.gguf"

    def ends(self, tokenizer: Any) -> Ends:
        """Where the model's answers end."""
        return self.run.require(Prepared).ends(tokenizer)

    def held_out(self) -> list[dict[str, Any]]:
        """Token rows that were not trained on."""
        rows = self.run.require(Prepared).token_rows(self.run.recipe.dataset).validation
        return list(rows)


def _compared(job: Job) -> Made:
    """The figures that choose the base, where there is a choice and rows to compare on."""
    rows = job.held_out() if job.method.base != "native" else []
    if not rows:
        return {}
    return {"compared": compare_merges(job.run.recipe, job.base_folder, job.adapter, rows)}


def _merge(job: Job) -> Made:
    temporary = job.folder / f".{MERGED}"
    for old in (temporary, job.merged):
        shutil.rmtree(old, ignore_errors=True)
    figures = _compared(job)
    default = "original" if job.method.base == "native" else "dequantised"
    chosen = figures["compared"]["chosen"] if figures else default
    began = time.monotonic()
    if job.method.adapter == "none":
        shutil.copytree(job.base_folder, temporary, ignore=shutil.ignore_patterns("*.safetensors*"))
        shutil.copytree(job.adapter, temporary, dirs_exist_ok=True)
    else:
        temporary.mkdir()
        kept = job.method.base if chosen == "dequantised" else "native"
        merge(job.base_folder, job.adapter, temporary, kept)
    texts.write_generation_config(temporary, job.ends(load_tokenizer(job.run.recipe)))
    temporary.rename(job.merged)
    seconds, size = time.monotonic() - began, folder_bytes(job.merged)
    rate = round(size / max(seconds, 1e-3))
    place = {"path": str(job.merged), "bytes": size, "bytes_per_s": rate}
    return {**place, "base": STORED[chosen], **figures}


def _gguf(job: Job) -> Made:
    kinds = job.run.recipe.export.gguf
    source, ends = job.gguf_path("f16"), job.ends(load_tokenizer(job.run.recipe)).token_ids
    for kind in sorted(kinds, key=lambda kind: kind != "f16"):
        if kind in gguf.DIRECT:
            gguf.convert_model(job.merged, job.gguf_path(kind), kind, ends)
            continue
        if not source.is_file():
            gguf.convert_model(job.merged, source, "f16", ends)
        gguf.quantise(source, job.gguf_path(kind), kind)
    if "f16" not in kinds:
        source.unlink(missing_ok=True)
    paths = [job.gguf_path(kind) for kind in kinds]
    size = sum(path.stat().st_size for path in paths)
    return {"path": str(paths[0]), "files": [str(path) for path in paths], "bytes": size}


def _gguf_lora(job: Job) -> Made:
    gguf.convert_adapter(job.adapter, job.base_folder, job.lora_path)
    command = f"llama-server -m BASE.gguf --lora {job.lora_path}"
    return {"path": str(job.lora_path), "bytes": job.lora_path.stat().st_size, "type": command}


def _smallest(job: Job) -> Path:
    kinds = job.run.recipe.export.gguf
    return job.gguf_path(min(kinds, key=lambda kind: QUANTISATIONS[kind].bits))


def _ollama(job: Job) -> Made:
    path = job.folder / "Modelfile"
    tokenizer = load_tokenizer(job.run.recipe)
    write_text(path, texts.modelfile(_smallest(job).name, tokenizer, job.ends(tokenizer)))
    return {"path": str(path), "type": f"ollama create {plain(job.run.name)} -f {path}"}


def _lemonade(job: Job) -> Made:
    """A folder that holds one file: several in one folder would be taken for one model's parts."""
    path = job.folder / "lemonade" / f"{plain(job.run.name)}.gguf"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(_smallest(job))
    return {"path": str(path), "type": texts.lemonade_command(path.parent)}


def _vllm(job: Job) -> Made:
    return {"type": texts.vllm_command(plain(job.run.name), job.merged)}


MAKE: dict[str, Callable[[Job], Made]] = {
    "merged": _merge,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "lemonade": _lemonade,
    "vllm": _vllm,
}
