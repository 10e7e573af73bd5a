"""Stage `export`: what servers need, and the proof that it answers like the trained model."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

from strixft.catalog.exports import QUANTISATIONS, with_needs
from strixft.evaluate.variants import load_variant
from strixft.export import texts
from strixft.export.make import MAKE, Job
from strixft.export.parity import Prompt, chosen_prompts, greedy_answers, measure_parity
from strixft.export.result import Exported
from strixft.guard.stage_watches import StageWatch
from strixft.model import gguf
from strixft.model.files import model_folder, shard_paths
from strixft.model.load import load_config, load_tokenizer, model_source
from strixft.plan.exportable import SERVED, require_kinds
from strixft.run.folder import Run
from strixft.run.open import set_aside
from strixft.support.disk import require_room
from strixft.support.errors import HostError
from strixft.support.files import write_text
from strixft.train.stage import ADAPTER, Trained

__all__ = ["Exported", "export_recipe"]


DEFAULT = ("gguf",)
"""Made where neither recipe nor command say what."""

UNPACKED_FROM_BITS = 4
"""Fewest bits of a weight in the files of a quantised base, which are written as 16."""

SMALL_BYTES = 64 * 2**20
"""Room for what stands beside the weights."""


def _base_folder(run: Run) -> Path:
    folder = model_folder(model_source(run.recipe.model))
    if folder is None:
        raise HostError(
            f"the files of {run.recipe.model} are not on this machine",
            fix=f"hf download {run.recipe.model}",
        )
    return folder


def _needed_bytes(run: Run, kinds: tuple[str, ...], base_folder: Path) -> int:
    """What the export will take on disk.

    A copy of the base, each GGUF file, and in float16 what is quantised further or carries an
    adapter.
    """
    size = sum(file.stat().st_size for file in shard_paths(base_folder))
    if getattr(load_config(run.recipe), "quantization_config", None):
        size *= 16 // UNPACKED_FROM_BITS
    asked = run.recipe.export.gguf
    files = sum(QUANTISATIONS[kind].bits / 16 for kind in asked)
    files += "f16" not in asked and not set(asked) <= set(gguf.DIRECT)
    copies = ("merged" in kinds) + ("gguf" in kinds) * files + ("gguf-lora" in kinds)
    return int(size * copies) + SMALL_BYTES


def _refuse_early(job: Job, kinds: tuple[str, ...]) -> None:
    """Refuse before the work what would fail after it.

    Raises:
        HostError: No room, or a program is missing.
        StageError: The method has no such export.
    """
    require_room(job.folder, _needed_bytes(job.run, kinds, job.base_folder))
    require_kinds(job.run.recipe, kinds)


def _answers(job: Job, tokenizer: Any) -> list[Prompt]:
    """Prompts with the trained model's answers; the model is not kept."""
    prompts = chosen_prompts(tokenizer, job.held_out())
    model = load_variant(job.run.recipe, job.adapter, "tuned")
    answers = greedy_answers(model, tokenizer, job.ends(tokenizer), prompts)
    del model
    gc.collect()
    return [(p, a) for p, a in zip(prompts, answers, strict=True) if a]


def _parity(job: Job, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Compare every GGUF file with the trained model on the same prompts."""
    tokenizer = load_tokenizer(job.run.recipe)
    pairs = _answers(job, tokenizer)
    asked = job.run.recipe.export.gguf if "gguf" in kinds else []
    found = {
        kind: measure_parity(job.gguf_path(kind), QUANTISATIONS[kind], tokenizer, pairs)
        for kind in asked
    }
    if "gguf-lora" in kinds:
        base = job.folder / ".base-f16.gguf"
        gguf.convert_model(job.base_folder, base, "f16", job.ends(tokenizer).token_ids)
        like = QUANTISATIONS["f16"]
        found["gguf-lora"] = measure_parity(base, like, tokenizer, pairs, job.lora_path)
        base.unlink()
    return found


def _licence(base_folder: Path) -> str | None:
    card = base_folder / "README.md"
    match = re.search(r"^license: *(\S+)", card.read_text(), re.M) if card.is_file() else None
    return match[1] if match else None


def _export(
    run: Run, folder: Path, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = run.require(Trained)
    job = Job(run, folder, _base_folder(run), trained.folder / ADAPTER)
    base = trained.require_same_base(run.recipe)
    _refuse_early(job, kinds)
    made, is_served = {}, bool(SERVED.intersection(kinds))
    with StageWatch(run, looks=False).watching_memory() as seen:
        for count, kind in enumerate(kinds):
            run.report_progress(done=count, total=len(kinds) + is_served)
            made[kind] = MAKE[kind](job)
        parity = _parity(job, kinds) if is_served else {}
    card = job.merged if job.merged.is_dir() else folder
    tokenizer, licence = load_tokenizer(run.recipe), _licence(job.base_folder)
    write_text(card / "README.md", texts.model_card(run, tokenizer, licence, made, parity))
    figures = {"made": made, "parity": parity, "kinds": list(kinds), "memory": seen}
    return {"base": base}, figures


def export_recipe(run: Run, to: tuple[str, ...] = ()) -> Exported:
    """Make what servers need of a trained run; it lies in `export/`.

    Args:
        run: A trained run.
        to: Kinds of export; those of the recipe if none are given.

    Raises:
        StageError: An earlier stage has not run, the base is another one, or a converter refuses.
        HostError: No room on disk, or a program is missing.
        FitError: The host runs out of memory.
    """
    kinds = with_needs(to or tuple(run.recipe.export.to) or DEFAULT)
    done = Exported.load(run.stage_folder(Exported.name))
    if done is not None and not set(kinds) <= set(done.figures["kinds"]):
        kinds = with_needs((*kinds, *done.figures["kinds"]))
        set_aside(run, (Exported.name,))
    return run.once(Exported, lambda folder: _export(run, folder, kinds))
