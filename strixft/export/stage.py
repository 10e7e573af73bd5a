"""Stage `export`: files for servers, and the proof that they answer like the trained model."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from strixft.catalog.exports import QUANTISATIONS, asked_exports, with_needs
from strixft.evaluate.variants import load_variant
from strixft.export import server_files
from strixft.export.make import MAKE, ExportJob
from strixft.export.parity import chosen_prompts, greedy_answers, measure_parity
from strixft.export.result import Exported
from strixft.guard.stage_watches import StageWatch
from strixft.model.files import model_folder, shard_paths
from strixft.model.source import load_config, model_source
from strixft.plan.exportable import SERVED, require_kinds
from strixft.recipe.schema import Recipe
from strixft.run.folder import Run
from strixft.run.open import set_aside
from strixft.servers import gguf
from strixft.support.errors import HostError
from strixft.support.files import free_aside, require_room, write_text
from strixft.support.progress import progress_bar
from strixft.train.stage import ADAPTER, Trained

__all__ = ["Exported", "export_recipe"]

DEFAULT = ("gguf",)
"""Kinds of export where neither recipe nor command names any."""

UNPACKED_FROM_BITS = 4
"""Fewest bits of a weight in the files of a quantised base; they are written in 16 bits."""

SMALL_BYTES = 64 * 2**20
"""Space for the files beside the weights."""


def base_bytes(recipe: Recipe, base_folder: Path) -> int:
    """Return the bytes of the base's weights at 16 bits."""
    size = sum(file.stat().st_size for file in shard_paths(base_folder))
    is_packed = bool(getattr(load_config(recipe), "quantization_config", None))
    return size * (16 // UNPACKED_FROM_BITS if is_packed else 1)


def _needed_bytes(job: ExportJob, kinds: tuple[str, ...], made: Collection[str]) -> int:
    """Return the bytes that the export needs on disk.

    They are a copy of the base, each GGUF file, and a float16 file if one is quantised further or
    carries an adapter; without what an earlier export made.
    """
    files = sum(QUANTISATIONS[kind].bits / 16 for kind in job.quantisations if kind not in made)
    files += "f16" not in job.quantisations and not set(job.quantisations) <= set(gguf.DIRECT)
    copies = ("merged" in kinds and "merged" not in made) + ("gguf" in kinds) * files
    copies += "gguf-lora" in kinds
    return int(base_bytes(job.run.recipe, job.base_folder) * copies) + SMALL_BYTES


def _parity(job: ExportJob, kinds: tuple[str, ...], known: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every GGUF file that is new with the trained model on the same prompts."""
    files = [kind for kind in (job.quantisations if "gguf" in kinds else ()) if kind not in known]
    if not files and "gguf-lora" not in kinds:
        return dict(known)
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
        for kind in files
    }
    if "gguf-lora" in kinds:
        base, like = job.folder / ".base-f16.gguf", QUANTISATIONS["f16"]
        gguf.convert_model(job.base_folder, base, "f16", job.ends.token_ids)
        adapter = job.gguf_path("lora-f16")
        found["gguf-lora"] = measure_parity(base, like, tokenizer, pairs, adapter)
        base.unlink()
    return {**known, **found}


def export_recipe(run: Run, to: tuple[str, ...] = ()) -> Exported:
    """Make the files that servers need from a trained run, in its folder `export/`.

    What an earlier export made stays: its files get a second name in the new folder.

    Args:
        run: A trained run.
        to: Kinds of export, or storage of a GGUF file, such as `q4_k_m`; by default those of the
            recipe.

    Raises:
        StageError: An earlier stage has not run, the base has changed, or a converter refuses.
        HostError: The disk is full, or a program is missing.
        FitError: The host runs out of memory.
        RecipeError: There is no such export.
    """
    names = to or tuple(run.recipe.export.to) or DEFAULT
    asked, files = asked_exports(names)
    kinds, place = with_needs(asked), run.stage_folder(Exported.name)
    earlier = Exported.load(place)
    has_files = files or (earlier is not None and earlier.quantisations)
    if "gguf" in names or ("gguf" in kinds and not has_files):
        files = tuple(dict.fromkeys((*run.recipe.export.gguf, *files)))
    if earlier is not None:
        if set(kinds) <= set(earlier.figures["kinds"]) and set(files) <= set(earlier.quantisations):
            return earlier
        kinds = with_needs((*kinds, *earlier.figures["kinds"]))
        files = tuple(dict.fromkeys((*earlier.quantisations, *files)))
        aside = free_aside(place)
        set_aside(run, (Exported.name,))
        earlier = replace(earlier, folder=aside)
    return run.once(Exported, lambda folder: _export(run, folder, kinds, files, earlier))


def _take_over(job: ExportJob, earlier: Exported) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give files of an earlier export of the same training a second name here.

    Returns:
        Figures of the merged model, if it is there, and of the comparisons that still hold.
    """
    made, parity = earlier.figures["made"], earlier.figures["parity"]
    kept: dict[str, Any] = {}
    merged = earlier.folder / job.merged.name
    if merged.is_dir() and "merged" in made:
        shutil.copytree(merged, job.merged, copy_function=os.link, dirs_exist_ok=True)
        kept["merged"] = {**made["merged"], "path": str(job.merged)}
    for kind in earlier.quantisations:
        path = earlier.folder / job.gguf_path(kind).name
        if path.is_file() and not job.gguf_path(kind).exists():
            job.gguf_path(kind).hardlink_to(path)
    return kept, {kind: row for kind, row in parity.items() if job.gguf_path(kind).is_file()}


def _export(
    run: Run,
    folder: Path,
    kinds: tuple[str, ...],
    files: tuple[str, ...],
    earlier: Exported | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    trained, base_folder = run.require(Trained), model_folder(model_source(run.recipe.model))
    if base_folder is None:
        raise HostError(
            f"the files of {run.recipe.model} are not on this machine",
            fix=f"hf download {run.recipe.model}",
        )
    job = ExportJob(run, folder, base_folder, trained.folder / ADAPTER, files)
    base = trained.require_same_base(run.recipe)
    made: dict[str, Any] = {}
    known: dict[str, Any] = {}
    if earlier is not None and earlier.inputs["base"] == base:
        with contextlib.suppress(OSError):  # a disk without second names: all is made again
            made, known = _take_over(job, earlier)
    # Refuse before the work what would fail after it.
    require_room(folder, _needed_bytes(job, kinds, {*made, *known}))
    require_kinds(run.recipe, kinds, files)
    is_served = bool(SERVED.intersection(kinds))
    with StageWatch(run, looks=False).watching_memory() as seen:
        for kind in progress_bar(kinds, unit="kind", desc="export"):
            made[kind] = made.get(kind) or MAKE[kind](job)
        parity = _parity(job, kinds, known) if is_served else {}
    card = job.merged if job.merged.is_dir() else folder
    text = server_files.model_card(run, base_folder, job.tokenizer, made, parity)
    write_text(card / "README.md", text)
    figures = {"made": made, "parity": parity, "kinds": list(kinds), "memory": seen}
    figures["quantisations"] = list(files)
    figures["weights"] = trained.weights
    return {"base": base}, figures
