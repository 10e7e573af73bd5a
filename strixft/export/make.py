"""`MAKE`: how each kind of export is made of a trained run."""

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
"""What the adapter is merged into, by how the method keeps the base."""

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

    def compared(self) -> list[dict[str, Any]]:
        """Rows on which the merged model is compared: held out, then trained on."""
        rows = self.run.require(Prepared).token_rows(self.run.recipe.dataset)
        sides = (rows.validation, rows.train)
        return [side[index] for side in sides for index in range(min(ROWS, len(side)))][:ROWS]


def _write_merged(job: Job, folder: Path, *, float32: bool = False) -> Made:
    """Merge into a folder; the model there beside the trained one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if job.method.adapter == "none":
        copy_beside(job.base_folder, folder)
        shutil.copytree(job.adapter, folder, dirs_exist_ok=True)
    else:
        merge(job.run.recipe, job.base_folder, job.adapter, folder, float32=float32)
    texts.write_generation_config(folder, job.ends(load_tokenizer(job.run.recipe)))
    return check_merged(job.run.recipe, job.adapter, folder, job.compared())


def _merge(job: Job) -> Made:
    """Weights keep the base's types; where these round too much away, they become float32."""
    temporary = job.folder / f".{MERGED}"
    shutil.rmtree(job.merged, ignore_errors=True)
    began = time.monotonic()
    check, rounded = _write_merged(job, temporary), None
    if check["faults"] and not check["exact"] and job.method.adapter != "none":
        require_room(job.folder, folder_bytes(temporary))  # it takes twice what is there
        check, rounded = _write_merged(job, temporary, float32=True), check
    require_same(check)
    seconds, size = time.monotonic() - began, folder_bytes(temporary)
    temporary.rename(job.merged)
    place = {"path": str(job.merged), "bytes": size, "seconds": round(seconds, 1)}
    return {**place, "base": STORED[job.method.base], "check": check, "rounded": rounded}


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
