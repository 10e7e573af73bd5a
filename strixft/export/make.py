"""`MAKE`: a function for each kind of export, which makes it from a trained run."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from strixft.catalog.exports import QUANTISATIONS
from strixft.catalog.methods import METHODS
from strixft.data.end_tokens import Ends
from strixft.export import server_files
from strixft.export.check import ROWS, check_merged
from strixft.export.merge import copy_beside, merge, pass_through
from strixft.model.source import load_tokenizer
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.servers import gguf
from strixft.support.errors import StageError
from strixft.support.files import folder_bytes, require_room, write_text

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
    """The exports of one run."""

    run: Run
    folder: Path
    base_folder: Path
    adapter: Path
    quantisations: tuple[str, ...]
    """Storage of the GGUF files."""

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.folder / "merged"

    def gguf_path(self, kind: str) -> Path:
        """Return the path of a GGUF file: of the merged model, or `lora-f16` of the adapter."""
        return self.folder / f"{plain(self.run.name)}-{kind}.gguf"

    @property
    def smallest(self) -> Path:
        """GGUF file with the fewest bits."""
        return self.gguf_path(min(self.quantisations, key=lambda kind: QUANTISATIONS[kind].bits))

    @cached_property
    def prepared(self) -> Prepared:
        """The rows of the run."""
        return self.run.require(Prepared)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the model."""
        return load_tokenizer(self.run.recipe)

    @cached_property
    def ends(self) -> Ends:
        """Ends of the model's answers."""
        return self.prepared.ends(self.tokenizer)


def _write_merged(job: ExportJob, folder: Path, *, float32: bool = False) -> Made:
    """Merge into a folder, and compare that model with the trained one."""
    recipe = job.run.recipe
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if METHODS[recipe.method].adapter == "none":
        copy_beside(job.base_folder, folder)
        shutil.copytree(job.adapter, folder, dirs_exist_ok=True)
        pass_through(recipe, job.base_folder, folder)
    else:
        merge(recipe, job.base_folder, job.adapter, folder, float32=float32)
    server_files.write_generation_config(folder, job.ends)
    rows = job.prepared.token_rows(recipe.dataset)
    compared = itertools.islice(itertools.chain(rows.validation, rows.train), ROWS)
    return check_merged(recipe, job.adapter, folder, list(compared))


def _merge(job: ExportJob) -> Made:
    """Merge in the base's types, or in float32 if those round too much away.

    Raises:
        StageError: The merged model is not the same function as the trained one.
    """
    temporary, method = job.folder / ".merged", METHODS[job.run.recipe.method]
    shutil.rmtree(job.merged, ignore_errors=True)
    began = time.monotonic()
    check, rounded = _write_merged(job, temporary), None
    if check["faults"] and not check["exact"] and method.adapter != "none":
        require_room(job.folder, folder_bytes(temporary))  # float32 takes twice that
        check, rounded = _write_merged(job, temporary, float32=True), check
    if check["faults"]:
        raise StageError(
            f"the merged model is not the trained one: {'; '.join(check['faults'])}",
            fix="--to gguf-lora   (the adapter alone, beside the base it was trained on)",
        )
    seconds, size = time.monotonic() - began, folder_bytes(temporary)
    temporary.rename(job.merged)
    place = {"path": str(job.merged), "bytes": size, "seconds": round(seconds, 1)}
    place["type"] = f"vllm serve {shlex.quote(str(job.merged))}"
    return {**place, "base": STORED[method.base], "check": check, "rounded": rounded}


def _gguf(job: ExportJob) -> Made:
    kinds, source = job.quantisations, job.gguf_path("f16")
    for kind in sorted(kinds, key=lambda kind: kind != "f16"):
        if job.gguf_path(kind).is_file():  # of an earlier export
            continue
        if kind in gguf.DIRECT:
            gguf.convert_model(job.merged, job.gguf_path(kind), kind, job.ends.token_ids)
            continue
        if not source.is_file():
            gguf.convert_model(job.merged, source, "f16", job.ends.token_ids)
        gguf.quantise(source, job.gguf_path(kind), kind)
    if "f16" not in kinds:
        source.unlink(missing_ok=True)
    paths = [job.gguf_path(kind) for kind in kinds]
    size = sum(path.stat().st_size for path in paths)
    command = f"llama-server --jinja -m {shlex.quote(str(job.smallest))}"
    files = [str(path) for path in paths]
    return {"path": files[0], "files": files, "bytes": size, "type": command}


def _gguf_lora(job: ExportJob) -> Made:
    path = job.gguf_path("lora-f16")
    gguf.convert_adapter(job.adapter, job.base_folder, path)
    command = f"llama-server --jinja -m BASE.gguf --lora {shlex.quote(str(path))}"
    return {"path": str(path), "bytes": path.stat().st_size, "type": command}


def _ollama(job: ExportJob) -> Made:
    path = job.folder / "Modelfile"
    write_text(path, server_files.modelfile(job.smallest.name, job.tokenizer, job.ends))
    return {
        "path": str(path),
        "type": f"ollama create {plain(job.run.name)} -f {shlex.quote(str(path))}",
    }


def _lemonade(job: ExportJob) -> Made:
    """Link one file into a folder of its own: Lemonade takes several for parts of one model.

    Source: lemonade-sdk/lemonade, docs/guide/configuration/custom-models.md; `pull` accepts hub
    checkpoints only. Not tried on one.
    """
    path = job.folder / "lemonade" / f"{plain(job.run.name)}.gguf"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(job.smallest)
    folder = shlex.quote(str(path.parent))
    command = f"lemonade config set extra_models_dir={folder} && lemonade list"
    return {"path": str(path), "type": command}


def _vllm(job: ExportJob) -> Made:
    name = plain(job.run.name)
    return {"type": f"vllm serve {shlex.quote(str(job.merged))} --served-model-name {name}"}


MAKE: dict[str, Callable[[ExportJob], Made]] = {
    "merged": _merge,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "lemonade": _lemonade,
    "vllm": _vllm,
}
