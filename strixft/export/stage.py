"""Stage `export`: files for servers, and the proof that they answer like the trained model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from strixft.catalog.exports import QUANTISATIONS, with_needs
from strixft.evaluate.variants import load_variant
from strixft.export import server_files
from strixft.export.make import MAKE, ExportJob
from strixft.export.parity import chosen_prompts, greedy_answers, measure_parity
from strixft.export.result import Exported
from strixft.guard.stage_watches import StageWatch
from strixft.model.files import model_folder, shard_paths
from strixft.model.source import load_config, model_source
from strixft.plan.exportable import SERVED, require_kinds
from strixft.run.folder import Run
from strixft.run.open import set_aside
from strixft.servers import gguf
from strixft.support.errors import HostError
from strixft.support.files import require_room, write_text
from strixft.support.progress import progress_bar
from strixft.train.stage import ADAPTER, Trained

__all__ = ["Exported", "export_recipe"]

DEFAULT = ("gguf",)
"""Kinds of export where neither recipe nor command names any."""

UNPACKED_FROM_BITS = 4
"""Fewest bits of a weight in the files of a quantised base; they are written in 16 bits."""

SMALL_BYTES = 64 * 2**20
"""Space for the files beside the weights."""


def _needed_bytes(job: ExportJob, kinds: tuple[str, ...]) -> int:
    """Return the bytes that the export needs on disk.

    They are a copy of the base, each GGUF file, and a float16 file if one is quantised further or
    carries an adapter.
    """
    size = sum(file.stat().st_size for file in shard_paths(job.base_folder))
    if getattr(load_config(job.run.recipe), "quantization_config", None):
        size *= 16 // UNPACKED_FROM_BITS
    asked = job.run.recipe.export.gguf
    files = sum(QUANTISATIONS[kind].bits / 16 for kind in asked)
    files += "f16" not in asked and not set(asked) <= set(gguf.DIRECT)
    copies = ("merged" in kinds) + ("gguf" in kinds) * files + ("gguf-lora" in kinds)
    return int(size * copies) + SMALL_BYTES


def _parity(job: ExportJob, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Compare every GGUF file with the trained model on the same prompts."""
    recipe, tokenizer = job.run.recipe, job.tokenizer
    held_out = list(job.prepared.token_rows(recipe.dataset).validation)
    prompts = chosen_prompts(tokenizer, held_out)
    model = load_variant(recipe, job.adapter, "tuned")
    answers = greedy_answers(model, tokenizer, job.ends, prompts)
    del model  # the servers need its memory
    gc.collect()
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    found = {
        kind: measure_parity(job.gguf_path(kind), QUANTISATIONS[kind], tokenizer, pairs)
        for kind in (recipe.export.gguf if "gguf" in kinds else [])
    }
    if "gguf-lora" in kinds:
        base, like = job.folder / ".base-f16.gguf", QUANTISATIONS["f16"]
        gguf.convert_model(job.base_folder, base, "f16", job.ends.token_ids)
        adapter = job.gguf_path("lora-f16")
        found["gguf-lora"] = measure_parity(base, like, tokenizer, pairs, adapter)
        base.unlink()
    return found


def export_recipe(run: Run, to: tuple[str, ...] = ()) -> Exported:
    """Make the files that servers need from a trained run, in its folder `export/`.

    Args:
        run: A trained run.
        to: Kinds of export; by default those of the recipe.

    Raises:
        StageError: An earlier stage has not run, the base has changed, or a converter refuses.
        HostError: The disk is full, or a program is missing.
        FitError: The host runs out of memory.
    """
    kinds = with_needs(to or tuple(run.recipe.export.to) or DEFAULT)
    done = Exported.load(run.stage_folder(Exported.name))
    if done is not None and not set(kinds) <= set(done.figures["kinds"]):
        kinds = with_needs((*kinds, *done.figures["kinds"]))
        set_aside(run, (Exported.name,))
    return run.once(Exported, lambda folder: _export(run, folder, kinds))


def _export(
    run: Run, folder: Path, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    trained, base_folder = run.require(Trained), model_folder(model_source(run.recipe.model))
    if base_folder is None:
        raise HostError(
            f"the files of {run.recipe.model} are not on this machine",
            fix=f"hf download {run.recipe.model}",
        )
    job = ExportJob(run, folder, base_folder, trained.folder / ADAPTER)
    base = trained.require_same_base(run.recipe)
    # Refuse before the work what would fail after it.
    require_room(folder, _needed_bytes(job, kinds))
    require_kinds(run.recipe, kinds)
    made, is_served = {}, bool(SERVED.intersection(kinds))
    with StageWatch(run, looks=False).watching_memory() as seen:
        for kind in progress_bar(kinds, unit="kind", desc="export"):
            made[kind] = MAKE[kind](job)
        parity = _parity(job, kinds) if is_served else {}
    card = job.merged if job.merged.is_dir() else folder
    text = server_files.model_card(run, base_folder, job.tokenizer, made, parity)
    write_text(card / "README.md", text)
    figures = {"made": made, "parity": parity, "kinds": list(kinds), "memory": seen}
    return {"base": base}, figures
