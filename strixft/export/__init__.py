"""Stage `export`: what servers need, and the proof that it answers like the trained model."""

from __future__ import annotations

import gc
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from strixft import views
from strixft.disk import folder_bytes, require_room
from strixft.errors import HostError, StageError
from strixft.evaluate import load_side
from strixft.export import gguf, texts
from strixft.export.merge import merge
from strixft.export.parity import chosen_prompts, greedy_answers, measure_parity
from strixft.exports import QUANTISATIONS, with_needs
from strixft.llama import require_runtime
from strixft.methods import METHODS
from strixft.model import load_tokenizer, model_source
from strixft.prepare import Prepared
from strixft.runs import Result, Run, set_aside, write_text
from strixft.train import ADAPTER, Trained
from strixft.units import format_gib
from strixft.weights import fingerprint_base, model_folder

DEFAULT = ("gguf",)
"""Made where neither recipe nor command say what."""
MERGED = "merged"


@dataclass(frozen=True, kw_only=True)
class Exported(Result):
    """Where the exports lie, and how they compare with the trained model."""

    name: ClassVar[str] = "export"

    @property
    def differs(self) -> list[str]:
        """GGUF files that do not answer like the trained model."""
        return [kind for kind, row in self.figures["parity"].items() if not row["passes"]]

    def require_parity(self) -> None:
        """Raise if an export differs.

        Raises:
            StageError: With what differs, and by how much.
        """
        if not self.differs:
            return
        rows = [f"{kind}: {_told(self.figures['parity'][kind])}" for kind in self.differs]
        raise StageError(
            "the export differs from the trained model; " + "; ".join(rows),
            fix="--set export.gguf=[f16] --run-dir …, or serve the merged folder: --to vllm",
        )

    def _repr_html_(self) -> str:
        made = [
            [kind, row.get("path", ""), format_gib(row.get("bytes")), row.get("type", "")]
            for kind, row in self.figures["made"].items()
        ]
        parity = [
            [kind, f"{row['top1']:.3f}", f"{row['greedy']:.3f}", _told(row)]
            for kind, row in self.figures["parity"].items()
        ]
        header = ["file", "same next token", "same answer", ""]
        warnings = "".join(views.warning(f"{kind} differs") for kind in self.differs)
        return (
            warnings
            + views.table(made, ["export", "where", "size", "type this"])
            + (views.table(parity, header) if parity else views.note("Not compared."))
        )


def _told(row: dict[str, Any]) -> str:
    if row["passes"]:
        return "answers like the trained model"
    found = []
    if row["top1"] < row["least_top1"] or row["greedy"] < row["least_greedy"]:
        found.append(
            f"same next token {row['top1']:.3f} (at least {row['least_top1']}),"
            f" same answer {row['greedy']:.3f} (at least {row['least_greedy']})"
        )
    if row["same_tokens"] < 1:
        found.append(f"its tokenizer cuts {1 - row['same_tokens']:.0%} of the prompts differently")
    if row["same_template"] is not True:
        said = f": {row['same_template']}" if row["same_template"] else ""
        found.append(f"llama.cpp cannot express the chat template{said}")
    return "; ".join(found)


@dataclass(frozen=True)
class _Job:
    """One export of one run."""

    run: Run
    folder: Path
    base_folder: Path
    adapter: Path

    @property
    def merged(self) -> Path:
        return self.folder / MERGED

    def gguf_path(self, kind: str) -> Path:
        return self.folder / f"{_plain(self.run.name)}-{kind}.gguf"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _base_folder(run: Run) -> Path:
    folder = model_folder(model_source(run.recipe.model))
    if folder is None:
        raise HostError(
            f"the files of {run.recipe.model} are not on this machine",
            fix=f"hf download {run.recipe.model}",
        )
    return folder


def _require_same_base(run: Run, trained: Trained) -> dict[str, str]:
    found = fingerprint_base(model_source(run.recipe.model))
    then = trained.inputs.get("base", found)
    changed = sorted(
        name for name in then.keys() | found.keys() if then.get(name) != found.get(name)
    )
    if changed:
        raise StageError(
            f"the adapter was trained on another base model: {', '.join(changed)} of"
            f" {run.recipe.model} changed since",
            fix=f"{run.resume_command} --from train",
        )
    return found


def _needed_bytes(run: Run, kinds: tuple[str, ...], base_folder: Path) -> int:
    """What the export will take on disk: a copy of the base, and each GGUF file."""
    size = sum(file.stat().st_size for file in base_folder.glob("*.safetensors"))
    files = sum(QUANTISATIONS[kind].bits / 16 for kind in run.recipe.export.gguf)
    return int(size * (("merged" in kinds) + ("gguf" in kinds) * files)) + 64 * 2**20


def _merge(job: _Job) -> dict[str, Any]:
    temporary = job.folder / f".{MERGED}"
    for old in (temporary, job.merged):
        shutil.rmtree(old, ignore_errors=True)
    began = time.monotonic()
    method = METHODS[job.run.recipe.method]
    if method.adapter == "none":
        shutil.copytree(job.base_folder, temporary, ignore=shutil.ignore_patterns("*.safetensors*"))
        shutil.copytree(job.adapter, temporary, dirs_exist_ok=True)
    else:
        temporary.mkdir()
        merge(job.base_folder, job.adapter, temporary, method.base)
    temporary.rename(job.merged)
    seconds, size = time.monotonic() - began, folder_bytes(job.merged)
    rate = round(size / max(seconds, 1e-3))
    stored = "as stored in training" if method.base != "native" else "original weights"
    return {"path": str(job.merged), "bytes": size, "bytes_per_s": rate, "base": stored}


def _gguf(job: _Job) -> dict[str, Any]:
    for kind in job.run.recipe.export.gguf:
        if kind in gguf.DIRECT:
            gguf.convert_model(job.merged, job.gguf_path(kind), kind)
        else:
            if not job.gguf_path("f16").is_file():
                gguf.convert_model(job.merged, job.gguf_path("f16"), "f16")
            gguf.quantise(job.gguf_path("f16"), job.gguf_path(kind), kind)
    paths = [job.gguf_path(kind) for kind in job.run.recipe.export.gguf]
    size = sum(path.stat().st_size for path in paths)
    return {"path": str(paths[0]), "files": [str(path) for path in paths], "bytes": size}


def _gguf_lora(job: _Job) -> dict[str, Any]:
    if METHODS[job.run.recipe.method].adapter != "lora":
        raise StageError(
            f"method {job.run.recipe.method} has no plain LoRA adapter", fix="--to gguf"
        )
    path = job.folder / f"{_plain(job.run.name)}-lora-f16.gguf"
    gguf.convert_adapter(job.adapter, job.base_folder, path)
    command = f"llama-server -m BASE.gguf --lora {path}"
    return {"path": str(path), "bytes": path.stat().st_size, "type": command}


def _smallest(job: _Job) -> Path:
    kinds = job.run.recipe.export.gguf
    return job.gguf_path(min(kinds, key=lambda kind: QUANTISATIONS[kind].bits))


def _ollama(job: _Job) -> dict[str, Any]:
    path = job.folder / "Modelfile"
    write_text(path, texts.modelfile(_smallest(job).name, load_tokenizer(job.run.recipe)))
    return {"path": str(path), "type": f"ollama create {_plain(job.run.name)} -f {path}"}


def _lemonade(job: _Job) -> dict[str, Any]:
    return {"type": texts.lemonade_command(_plain(job.run.name), _smallest(job))}


def _vllm(job: _Job) -> dict[str, Any]:
    return {"type": texts.vllm_command(_plain(job.run.name), job.merged)}


MAKE: dict[str, Callable[[_Job], dict[str, Any]]] = {
    "merged": _merge,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "lemonade": _lemonade,
    "vllm": _vllm,
}


def _parity(job: _Job) -> dict[str, Any]:
    """Compare every GGUF file with the trained model on the same prompts."""
    run = job.run
    tokenizer = load_tokenizer(run.recipe)
    rows = list(run.require(Prepared).token_rows(run.recipe.dataset).validation)
    prompts = chosen_prompts(tokenizer, rows)
    model = load_side(run.recipe, job.adapter, "tuned")
    answers = greedy_answers(model, tokenizer, prompts)
    del model
    gc.collect()
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    return {
        kind: measure_parity(job.gguf_path(kind), QUANTISATIONS[kind], tokenizer, pairs)
        for kind in run.recipe.export.gguf
    }


def _licence(base_folder: Path) -> str | None:
    card = base_folder / "README.md"
    match = re.search(r"^license: *(\S+)", card.read_text(), re.M) if card.is_file() else None
    return match[1] if match else None


def _export(
    run: Run, folder: Path, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = run.require(Trained)
    job = _Job(run, folder, _base_folder(run), trained.folder / ADAPTER)
    base = _require_same_base(run, trained)
    require_room(folder, _needed_bytes(run, kinds, job.base_folder))
    if "gguf" in kinds:
        gguf.require_tools(kinds, run.recipe.export.gguf)
        require_runtime()
    made = {}
    for count, kind in enumerate(kinds):
        run.report_progress(done=count, total=len(kinds) + ("gguf" in kinds))
        made[kind] = MAKE[kind](job)
    parity = _parity(job) if "gguf" in kinds else {}
    card = job.merged if job.merged.is_dir() else folder
    write_text(card / "README.md", texts.model_card(run, _licence(job.base_folder), parity))
    return {"base": base}, {"made": made, "parity": parity, "kinds": list(kinds)}


def export_recipe(run: Run, to: tuple[str, ...] = ()) -> Exported:
    """Make what servers need of a trained run; it lies in `export/`.

    Args:
        run: A trained run.
        to: Kinds of export; those of the recipe if none are given.

    Raises:
        StageError: An earlier stage has not run, the base is another one, or a converter refuses.
        HostError: No room on disk, or a program is missing.
    """
    kinds = with_needs(to or tuple(run.recipe.export.to) or DEFAULT)
    done = Exported.load(run.stage_folder(Exported.name))
    if done is not None and not set(kinds) <= set(done.figures["kinds"]):
        kinds = with_needs((*kinds, *done.figures["kinds"]))
        set_aside(run, (Exported.name,))
    return run.once(Exported, lambda folder: _export(run, folder, kinds))
