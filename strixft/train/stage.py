"""Stage `train`: the planned step in the training loop, watched and measured."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed

from strixft.catalog.trackers import require_trackers
from strixft.data.batches import Batch
from strixft.guard.advice import finite_again, less_memory, loss_spikes
from strixft.guard.host import cap, training_host
from strixft.guard.stage_watches import Watches
from strixft.model.adapter import attach_adapter, base_of, copy_weights
from strixft.model.files import fingerprint_base
from strixft.model.kernels import switch_off
from strixft.model.load import fetch_base, load_base
from strixft.model.source import load_config, model_source
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared, require_known_tokens
from strixft.probe.checks import fastest_blas
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.run.first_weights import first_weights
from strixft.run.folder import Result, Run, resume_command
from strixft.run.open import READ_BY
from strixft.step.memory_tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep
from strixft.support.environment import seen_by_torch
from strixft.support.errors import FitError, StageError, is_out_of_memory
from strixft.support.files import require_room, write_json
from strixft.support.progress import say
from strixft.support.units import format_gib
from strixft.train import coverage
from strixft.train.batches import TrainingBatches
from strixft.train.checkpoints import KEPT, Checkpoints
from strixft.train.compare import GAP_FLAGGED, device_parts, trained_html
from strixft.train.held_out import Evaluation, HeldOut, best, keep_best, keep_result
from strixft.train.loop import NotFiniteError, TrainingLoop
from strixft.train.progress import ProgressLog
from strixft.train.proof import expected, proof_batches, prove
from strixft.train.trackers import Trackers

ADAPTER = "adapter"
"""Folder of the trained weights: a PEFT adapter, or a whole model for `method: full`."""

CHECKPOINTS, PROOF, COVERAGE = "checkpoints", "proof.json", "coverage.json"

NO_UPDATE = ("held_out_every", "early_stop", "keep", "trackers")
"""Settings of `train` that no update depends on."""

CHECKPOINT_FORMAT = 2
"""Changes with the files of a checkpoint: one of another format is refused."""


@dataclass(frozen=True, kw_only=True)
class Trained(Result):
    """Losses, speed and memory of the training."""

    name: ClassVar[str] = "train"
    artefacts: ClassVar[tuple[str, ...]] = (f"{ADAPTER}/*",)

    def require_same_base(self, recipe: Recipe) -> dict[str, str]:
        """Return the files of the base with their hashes, if it is the one that was trained.

        Raises:
            StageError: It is another one.
        """
        found = fingerprint_base(model_source(recipe.model))
        then = self.inputs.get("base", found)
        changed = sorted(n for n in then.keys() | found.keys() if then.get(n) != found.get(n))
        if changed:
            run = self.folder.parent
            raise StageError(
                f"the adapter was trained on another base model: {', '.join(changed)} of"
                f" {recipe.model} changed since",
                fix=f"restore it, or: {resume_command(run)} --from train",
            )
        return found

    @property
    def weights(self) -> str:
        """The weights that were kept, in words."""
        told = self.figures.get("held_out") or {"kept": "last"}  # a run of an older version
        of = f", after update {told['best']['update']}" if told["kept"] == "best" else ""
        return f"{told['kept']}{of}"

    def _repr_html_(self) -> str:
        return trained_html(self.figures)


def train_recipe(run: Run) -> Trained:
    """Train a planned run; the weights lie in `train/adapter`.

    Raises:
        FitError: The plan does not fit, or the device or the host ran out of memory.
        StageError: An earlier stage has not run, or a loss or a gradient is not finite.
        Stopped: The user asked for it; the last finished update is saved.
    """
    return run.once(Trained, partial(_train, run))


def _train(run: Run, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, plan = run.require(Prepared), run.require(Plan)
    plan.require_fit()
    job, planned = _planned_job(run, plan), plan.figures
    capped = cap(planned["host"]["budget_bytes"], planned["reserved_bytes"])
    watches = Watches(run)
    if capped.warning:
        watches.warn(capped.warning)
    missed = [name for name, value in seen_by_torch().items() if value is None]
    if missed and torch.version.hip is not None:
        watches.warn(f"{', '.join(missed)} was set after torch was imported: import strixft first")
    require_trackers(run.recipe.train.trackers, offline=run.recipe.offline)
    require_known_tokens(run.recipe, prepared)
    fetch_base(run.recipe)  # the hashes of its files are inputs
    plan.require_same_config(run.recipe)  # the model's own comes with its weights
    inputs = _inputs(run, prepared, plan)
    with watches.watching() as seen:
        checkpoints = Checkpoints(folder / CHECKPOINTS, inputs)
        newest = checkpoints.newest()
        for torn in checkpoints.set_aside:
            _warn(watches, f"a checkpoint is damaged and was set aside: {torn}")
        if checkpoints.set_aside and newest is None:
            say("Warning: no whole checkpoint is left; training begins again with update 1")
        trackers = Trackers(run, newest.update if newest else -1, partial(_warn, watches))
        bar = ProgressLog(run, planned["updates"], trackers)
        batches = TrainingBatches(job, prepared, planned["choice"])
        first = [] if newest else proof_batches(batches(0))
        step, proof = _build_step(job, plan, first, folder / PROOF)
        if newest is None and (before := first_weights(run.recipe)) is not None:
            copy_weights(step.model, before.folder / ADAPTER)
        if step.dropout:
            share = f"{step.dropout:g}"
            _warn(watches, f"training leaves out the dropout of {share} that the model has")
        told, watch = coverage.cover(step, (first or batches(0))[0], folder / COVERAGE)
        for warning in coverage.warnings_of(told):
            _warn(watches, warning)
        loop = TrainingLoop(
            step,
            batches,
            planned["updates"],
            checkpoints,
            watches.hang,
            reserve_bytes=round(planned["reserved_bytes"] * (1 + GAP_FLAGGED)),
            is_asked=watches.is_asked,
            on_update=bar,
            first=watch,
            held_out=HeldOut.planned(run.recipe, prepared, planned, job.host.device),
            on_held_out=partial(_take_evaluation, bar, step.model, folder),
        )
        _require_room(step, checkpoints, planned)
        ends = _ends_saved(run, job, plan, loop, batches)
        with contextlib.closing(bar), peak_memory(step.model) as memory, ends:
            loop.run(newest)
        if not loop.is_over:
            raise watches.stop_error(loop.progress.update, loop.updates)
        rate = bar.tok_per_s(loop.progress)
        memory["peak_parts"] = memory["peak_parts"] or device_parts(
            step.model, step.optimizer, memory["peak_bytes"]
        )
        if loop.stopped_early:
            ended = f"ended early, after update {loop.progress.update} of {loop.updates}"
            _warn(watches, f"{ended}: {loop.stopped_early}")
        kept = keep_result(run.recipe.train.keep, step.model, folder, ADAPTER)
        if kept is None and run.recipe.train.keep == "best":
            _warn(watches, "no held-out loss was finite: the last weights are kept")
    compared = ("peak_bytes", "reserved_bytes", "parts", "tok_per_s")
    figures = {
        "first_update": loop.first_update,
        "updates": loop.progress.update,
        "losses": loop.progress.losses,
        "spikes": loss_spikes(loop.progress.losses),
        "tokens": loop.progress.tokens,
        "tok_per_s": rate,
        "train_seconds": round(bar.busy_s, 3),
        "earlier_seconds": round(bar.earlier_s, 3),
        **{f"planned_{name}": planned[name] for name in compared},
        **memory,
        **seen,
        "cap": capped.says,
        "proof": proof,
        "trained": _read(folder / COVERAGE) or told,
        "checkpoints_set_aside": checkpoints.torn,
        "held_out": {
            "evaluations": loop.progress.evaluations,
            "best": kept or best(loop.progress.evaluations),
            "kept": "best" if kept else "last",
            "stopped_early": loop.stopped_early,
        },
    }
    return {name: inputs[name] for name in ("rows_sha256", "choice", "base")}, figures


def _planned_job(run: Run, plan: Plan) -> Job:
    """Return the job as planned, once this device has tried what the plan chose."""
    recipe, host = run.recipe, training_host()
    here = "" if recipe.memory.host in ("auto", "cpu") else " --set memory.host=auto"
    again = f"{run.resume_command}{here} --from plan"
    job = Job.planned(recipe, load_config(recipe), host, plan.figures["choice"], again)
    switch_off(job.proof.bad_kernels)
    if (library := fastest_blas(job.method, host)) is not None:
        torch.backends.cuda.preferred_blas_library(library)
    return job


def _warn(watches: Watches, text: str) -> None:
    watches.warn(text)
    say(f"Warning: {text}")


def _inputs(run: Run, prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """Return all that the trained weights depend on; checkpoints of other inputs are refused."""
    recipe = {
        section: settings
        for section, settings in run.recipe.to_dict().items()
        if READ_BY.get(section) in ("prepare", "plan")  # no weight depends on the rest
    }
    recipe["train"] = {k: v for k, v in recipe["train"].items() if k not in NO_UPDATE}
    return {
        "checkpoint_format": CHECKPOINT_FORMAT,
        "recipe": recipe,
        "rows_sha256": prepared.inputs["rows_sha256"],
        "choice": plan.figures["choice"],
        "base": fingerprint_base(model_source(run.recipe.model)),
        **({"init_from": first} if (first := _first_adapter(run)) else {}),
    }


def _first_adapter(run: Run) -> dict[str, str] | None:
    """Return the files of the adapter that the training begins with, with their hashes.

    Raises:
        StageError: It was trained on another base.
    """
    before = first_weights(run.recipe)
    if before is None:
        return None
    if before.inputs["base"] != fingerprint_base(model_source(run.recipe.model)):
        raise StageError(
            f"init_from: the files of {run.recipe.model} have changed since {before.folder.parent}"
            " was trained",
            fix="restore them, or leave init_from out",
        )
    return before.files


def _build_step(
    job: Job, plan: Plan, first: Sequence[Batch], path: Path
) -> tuple[TrainingStep, dict[str, Any]]:
    """Load the model, build its step, and prove the first loss.

    Args:
        job: The job as planned.
        plan: Its plan.
        first: Micro-batches to prove it on; none where training goes on, with other weights.
        path: File with the figures of the proof, which are returned too.
    """
    recipe, began = job.recipe, time.monotonic()
    set_seed(recipe.train.seed)
    base = load_base(recipe, job.host.device, job.dtype)
    loaded = time.monotonic()
    parts, phases = plan.figures["parts"], plan.figures["phases"]
    room = phases["proof"]["device_bytes"] - parts["weights"] - parts["adapter"]
    documents = expected(base, first, room) if first else []
    release_memory()
    model = attach_adapter(base, job.method, recipe.lora, job.architecture.idle)
    step = TrainingStep(model, recipe.train, job.options)
    if first:
        proof = prove(step, first, documents)
        release_memory()
        seconds = {"load_s": loaded - began, "seconds": time.monotonic() - loaded}
        write_json(path, {**asdict(proof), **seconds})
    return step, _read(path)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _require_room(step: TrainingStep, checkpoints: Checkpoints, planned: Mapping[str, Any]) -> None:
    """Require room for the checkpoints that stay, the one being written, best and result."""
    weights = sum(weight.nbytes for weight in step.trainable())
    moments = 2 * sum(weight.numel() * 4 for weight in step.trainable())
    left = max(0, KEPT + 1 - checkpoints.count())
    results = 3 if (planned.get("held_out") or {}).get("every") else 1  # one best is replaced
    require_room(checkpoints.folder, left * (weights + moments) + results * weights)


def _take_evaluation(
    bar: ProgressLog, model: Any, folder: Path, done: Sequence[Evaluation]
) -> None:
    bar.note_evaluation(done[-1])
    keep_best(model, folder, done)


@contextlib.contextmanager
def _ends_saved(
    run: Run, job: Job, plan: Plan, loop: TrainingLoop, batches: TrainingBatches
) -> Iterator[None]:
    """Save the last finished update after an error, and say what ended the training."""
    try:
        yield
    except (NotFiniteError, RuntimeError, MemoryError) as error:
        if not (isinstance(error, NotFiniteError) or is_out_of_memory(error)):
            raise
        loop.save_finished()
        update, saved = loop.progress.update, "none was finished before"
        if loop.checkpoints.has(update):
            saved = f"update {update} is saved"
        elif loop.checkpoints.count():
            saved = "the last checkpoint stays"
        if not isinstance(error, NotFiniteError):
            peak = torch.cuda.max_memory_allocated() if job.host.device == "cuda" else None
            raise out_of_memory(run.recipe, plan, f"no memory is left; {saved}", peak) from error
        rows = "; ".join(batches.names(error.update - 1, error.micro_batches))
        base = base_of(loop.step.model)
        raise StageError(
            f"{error}; {saved}\n  its rows: {rows}",
            fix=finite_again(
                run.recipe,
                error.update,
                device=job.host.device,
                is_float16=base.dtype is torch.float16,
                model_type=base.config.model_type,
            ),
        ) from error


def out_of_memory(recipe: Recipe, plan: Plan, what: str, peak_bytes: int | None) -> FitError:
    """Return the error of a run that took more memory than there was.

    Args:
        recipe: The recipe that ran.
        plan: Its plan.
        what: The event, in words.
        peak_bytes: The most that was allocated, where it is known.
    """
    planned, seen = format_gib(plan.figures["peak_bytes"]), format_gib(peak_bytes)
    return FitError(
        f"{what}; the plan's peak is {planned}, the peak seen {seen}",
        fix=less_memory(recipe, plan.figures),
    )
