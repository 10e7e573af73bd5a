"""`MAKE`: a function for each kind of export, which makes it from a trained run."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.catalog.exports import QUANTISATIONS
from strixft.catalog.methods import METHODS, Method
from strixft.data.ends import Ends
from strixft.export import texts
from strixft.export.check import ROWS, check_merged, require_same
from strixft.export.merge import copy_beside, merge
from strixft.model import gguf
from strixft.model.load import load_tokenizer
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.support.disk import folder_bytes, require_room
from strixft.support.files import write_text

MERGED = "merged"

STORED = {
    "native": "the base's own weights",
    "nf4": "the base's 4-bit weights, as training stored them",
    "int8": "the base's 8-bit weights, as training stored them",
}
"""Storage of the base by the method → description of the weights that are merged into."""

Made = dict[str, Any]


def plain(name: str) -> str:
    """Return a name without characters that servers refuse.

    >>> plain("my run/2")
    'my-run-2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


@dataclass(frozen=True)
class ExportJob:
    """One export of one run."""

    run: Run
    folder: Path
    base_folder: Path
    adapter: Path

    @property
    def method(self) -> Method:
        """The training method."""
        return METHODS[self.run.recipe.method]

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.folder / MERGED

    @property
    def lora_path(self) -> Path:
        """GGUF file of the adapter."""
        return self.folder / f"{plain(self.run.name)}-lora-f16.gguf"

    def gguf_path(self, kind: str) -> Path:
        """Return the path of a GGUF file of the merged model."""
        return self.folder / f"{plain(self.run.name)}-{kind}.gguf"

    def ends(self, tokenizer: Any) -> Ends:
        """Return the ends of the model's answers."""
        return self.run.require(Prepared).ends(tokenizer)

    def held_out(self) -> list[dict[str, Any]]:
        """Return token rows that were not trained on."""
        return list(self.run.require(Prepared).token_rows(self.run.recipe.dataset).validation)

    def compared(self) -> list[dict[str, Any]]:
        """Return rows on which the merged model is compared: held out, then trained on."""
        rows = self.run.require(Prepared).token_rows(self.run.recipe.dataset)
        splits = (rows.validation, rows.train)
        return [split[index] for split in splits for index in range(min(ROWS, len(split)))][:ROWS]


def _write_merged(job: ExportJob, folder: Path, *, float32: bool = False) -> Made:
    """Merge into a folder, and compare that model with the trained one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if job.method.adapter == "none":
        copy_beside(job.base_folder, folder)
        shutil.copytree(job.adapter, folder, dirs_exist_ok=True)
    else:
        merge(job.run.recipe, job.base_folder, job.adapter, folder, float32=float32)
    texts.write_generation_config(folder, job.ends(load_tokenizer(job.run.recipe)))
    return check_merged(job.run.recipe, job.adapter, folder, job.compared())


def _merge(job: ExportJob) -> Made:
    """Merge in the base's types, or in float32 if those round too much away."""
    temporary = job.folder / f".{MERGED}"
    shutil.rmtree(job.merged, ignore_errors=True)
    began = time.monotonic()
    check, rounded = _write_merged(job, temporary), None
    if check["faults"] and not check["exact"] and job.method.adapter != "none":
        require_room(job.folder, folder_bytes(temporary))  # float32 takes twice that
        check, rounded = _write_merged(job, temporary, float32=True), check
    require_same(check)
    seconds, size = time.monotonic() - began, folder_bytes(temporary)
    temporary.rename(job.merged)
    place = {"path": str(job.merged), "bytes": size, "seconds": round(seconds, 1)}
    return {**place, "base": STORED[job.method.base], "check": check, "rounded": rounded}


def _gguf(job: ExportJob) -> Made:
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


def _gguf_lora(job: ExportJob) -> Made:
    gguf.convert_adapter(job.adapter, job.base_folder, job.lora_path)
    command = f"llama-server -m BASE.gguf --lora {job.lora_path}"
    return {"path": str(job.lora_path), "bytes": job.lora_path.stat().st_size, "type": command}


def _smallest(job: ExportJob) -> Path:
    kinds = job.run.recipe.export.gguf
    return job.gguf_path(min(kinds, key=lambda kind: QUANTISATIONS[kind].bits))


def _ollama(job: ExportJob) -> Made:
    path = job.folder / "Modelfile"
    tokenizer = load_tokenizer(job.run.recipe)
    write_text(path, texts.modelfile(_smallest(job).name, tokenizer, job.ends(tokenizer)))
    return {"path": str(path), "type": f"ollama create {plain(job.run.name)} -f {path}"}


def _lemonade(job: ExportJob) -> Made:
    """Link one file into a folder of its own: Lemonade takes several for parts of one model."""
    path = job.folder / "lemonade" / f"{plain(job.run.name)}.gguf"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(_smallest(job))
    return {"path": str(path), "type": texts.lemonade_command(path.parent)}


MAKE: dict[str, Callable[[ExportJob], Made]] = {
    "merged": _merge,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "lemonade": _lemonade,
    "vllm": lambda job: {"type": texts.vllm_command(plain(job.run.name), job.merged)},
}
