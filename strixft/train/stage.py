"""Stage `train`: the planned step in the training loop, watched and measured."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from torch import nn

from strixft.data.batches import Batch, PackedShape, collate, on_device
from strixft.data.pack import rows_of_epochs, training_order
from strixft.guard.advice import finite_again, less_memory, loss_spikes
from strixft.guard.cap import cap
from strixft.guard.host import training_host
from strixft.guard.stage_watches import Watches
from strixft.model.adapter import attach_adapter, base_of
from strixft.model.files import fingerprint_base
from strixft.model.load import load_base, load_config, model_source
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared, require_known_tokens
from strixft.probe.checks import fastest_blas
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.run.folder import Result, Run, resume_command
from strixft.run.open import READ_BY
from strixft.step.tracker import peak_memory, release_memory
from strixft.step.update import TrainingStep
from strixft.support.disk import require_room
from strixft.support.environment import seen_by_torch
from strixft.support.errors import FitError, StageError, is_out_of_memory
from strixft.support.files import write_json
from strixft.support.progress import progress_bar, say
from strixft.support.units import format_gib
from strixft.train.checkpoints import KEPT, Checkpoints
from strixft.train.compare import GAP_FLAGGED, device_parts, planned_figures, trained_html
from strixft.train.loop import NotFiniteError, Progress, TrainingLoop
from strixft.train.proof import expected, proof_batches, prove

ADAPTER = "adapter"
"""Folder of the trained weights: a PEFT adapter, or a whole model for `method: full`."""

CHECKPOINTS, PROOF = "checkpoints", "proof.json"

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

    def _repr_html_(self) -> str:
        return trained_html(self.figures)


def train_recipe(run: Run) -> Trained:
    """Train a planned run; the weights lie in `train/adapter`.

    Raises:
        FitError: The plan does not fit, or the device or the host ran out of memory.
        StageError: An earlier stage has not run, or a loss or a gradient is not finite.
        Stopped: The user asked for it; the last finished update is saved.
    """
    return run.once(Trained, lambda folder: _train(run, folder))


def _train(run: Run, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, plan = run.require(Prepared), run.require(Plan)
    plan.require_fit()
    job, planned = _planned_job(run, plan), plan.figures
    capped = cap(planned["host"]["budget_bytes"], planned["reserved_bytes"])
    watches, bar = Watches(run), _Bar(run, planned["updates"])
    _warn_early(watches, capped.warning)
    require_known_tokens(run.recipe, prepared)
    with watches.watching() as seen:
        saved = run.stage_folder(Trained.name) / CHECKPOINTS
        checkpoints = Checkpoints(saved, _inputs(run, prepared, plan))
        newest = checkpoints.newest()
        _tell_set_aside(checkpoints, watches)
        batches = _Batches(job, prepared, planned["choice"])
        step, proof = _build_step(run, job, plan, [] if newest else proof_batches(batches(0)))
        if step.dropout:
            left_out = f"training leaves out the dropout of {step.dropout:g} that the model has"
            watches.warn(left_out)
            say(f"Warning: {left_out}")
        plan.require_same_config(run.recipe)  # the model's own came with its weights
        loop = TrainingLoop(
            step,
            batches,
            planned["updates"],
            checkpoints,
            watches.hang,
            reserve_bytes=round(planned["reserved_bytes"] * (1 + GAP_FLAGGED)),
            is_asked=watches.is_asked,
            on_update=bar,
        )
        _require_room(step, checkpoints)
        began = time.monotonic()
        with bar, peak_memory(step.model) as memory, _ends_saved(run, job, plan, loop, batches):
            loop.run(newest)
        if loop.progress.update < loop.updates:
            raise watches.stop_error(loop.progress.update, loop.updates)
        seconds, rate = time.monotonic() - began, bar.tok_per_s(loop.progress)
        memory["peak_parts"] = memory["peak_parts"] or device_parts(
            step.model, step.optimizer, memory["peak_bytes"]
        )
        _save(step.model, folder)
    figures = {
        "first_update": loop.first_update,
        "updates": loop.progress.update,
        "losses": loop.progress.losses,
        "spikes": loss_spikes(loop.progress.losses),
        "tokens": loop.progress.tokens,
        "tok_per_s": rate,
        "train_seconds": round(seconds, 3),
        **planned_figures(planned),
        **memory,
        **seen,
        "cap": capped.says,
        "proof": proof,
        "checkpoints_set_aside": checkpoints.torn,
    }
    inputs = _inputs(run, prepared, plan)
    return {name: inputs[name] for name in ("rows_sha256", "choice", "base")}, figures


def _planned_job(run: Run, plan: Plan) -> Job:
    """Return the job as planned, once this device has tried what the plan chose."""
    recipe, host = run.recipe, training_host()
    here = "" if recipe.memory.host in ("auto", "cpu") else " --set memory.host=auto"
    again = f"{run.resume_command}{here} --from plan"
    job = Job.planned(recipe, load_config(recipe), host, plan.figures["choice"], again)
    if (library := fastest_blas(job.method, host)) is not None:
        torch.backends.cuda.preferred_blas_library(library)
    return job


def _warn_early(watches: Watches, no_cap: str | None) -> None:
    """Warn of an allocator without a limit, and of variables that ROCm's torch did not see."""
    if no_cap:
        watches.warn(no_cap)
    missed = [name for name, value in seen_by_torch().items() if value is None]
    if missed and torch.version.hip is not None:
        watches.warn(f"{', '.join(missed)} was set after torch was imported: import strixft first")


def _inputs(run: Run, prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """Return all that the trained weights depend on; checkpoints of other inputs are refused."""
    return {
        "checkpoint_format": CHECKPOINT_FORMAT,
        "recipe": {
            section: settings
            for section, settings in run.recipe.to_dict().items()
            if READ_BY.get(section) in ("prepare", "plan")  # no weight depends on the rest
        },
        "rows_sha256": prepared.inputs["rows_sha256"],
        "choice": plan.figures["choice"],
        "base": fingerprint_base(model_source(run.recipe.model)),
    }


def _tell_set_aside(checkpoints: Checkpoints, watches: Watches) -> None:
    """Warn loudly that training goes on from an earlier update than the last one saved."""
    for torn in checkpoints.set_aside:
        watches.warn(f"a checkpoint is damaged and was set aside: {torn}")
        say(f"Warning: a checkpoint is damaged and was set aside: {torn}")
    if checkpoints.set_aside and not checkpoints.count():
        say("Warning: no whole checkpoint is left; training begins again with update 1")


class _Batches:
    """Micro-batches of each update, in the order of training."""

    def __init__(self, job: Job, prepared: Prepared, choice: dict[str, Any]) -> None:
        recipe, shape = job.recipe, choice["packed"]
        self._prepared, self._device = prepared, job.host.device
        self._size, self._steps = choice["micro_batch_rows"], choice["gradient_accumulation_steps"]
        self._shape = PackedShape(**shape) if shape else None
        self._rows: Any = (
            prepared.packed_rows(recipe.dataset)
            if shape
            else prepared.token_rows(recipe.dataset).train
        )
        sizes = self._rows.sums("num_trained").tolist() if shape else self._rows["length"]
        num_rows = rows_of_epochs(len(sizes), recipe.train.epochs)
        seed, padded = recipe.train.seed, not shape
        self._order = training_order(sizes, num_rows, seed, self._size, padded=padded)

    def _numbers(self, update: int) -> list[list[int]]:
        """Rows of each micro-batch of an update; the last update may have fewer."""
        per_update = self._steps * self._size
        chosen = self._order[update * per_update : (update + 1) * per_update]
        return [chosen[start : start + self._size] for start in range(0, len(chosen), self._size)]

    def _batch(self, numbers: list[int]) -> Batch:
        rows = self._rows.take(numbers) if self._shape else [self._rows[n] for n in numbers]
        return on_device(collate(rows, self._shape), self._device)

    def __call__(self, update: int) -> list[Batch]:
        """Return the micro-batches of an update, counted from 0, on the device."""
        return [self._batch(numbers) for numbers in self._numbers(update)]

    def names(self, update: int, micro_batches: Iterable[int]) -> list[str]:
        """Return the rows of some micro-batches of an update, by file and number."""
        numbers = self._numbers(update)
        chosen = [row for step in micro_batches for row in numbers[step]]
        return self._prepared.names_of(self._rows, chosen)


def _build_step(
    run: Run, job: Job, plan: Plan, first: Sequence[Batch]
) -> tuple[TrainingStep, dict[str, Any]]:
    """Load the model, build its step, and prove the first loss.

    Args:
        run: The run that is trained.
        job: The job as planned.
        plan: Its plan.
        first: Micro-batches to prove it on; none where training goes on, with other weights.

    Returns:
        The step, and figures of the proof.
    """
    recipe, began = job.recipe, time.monotonic()
    set_seed(recipe.train.seed)
    base = load_base(recipe, job.host.device, job.dtype)
    loaded = time.monotonic()
    parts, phases = plan.figures["parts"], plan.figures["phases"]
    room = phases["proof"]["device_bytes"] - parts["weights"] - parts["adapter"]
    documents = expected(base, first, room) if first else []
    release_memory()
    step = TrainingStep(attach_adapter(base, job.method, recipe.lora), recipe.train, job.options)
    path = run.stage_folder(Trained.name) / PROOF
    if first:
        proof = prove(step, first, documents)
        release_memory()
        seconds = {"load_s": loaded - began, "seconds": time.monotonic() - loaded}
        write_json(path, {**asdict(proof), **seconds})
    return step, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _require_room(step: TrainingStep, checkpoints: Checkpoints) -> None:
    """Require room for the checkpoints that stay, the one being written and the result."""
    weights = sum(weight.nbytes for weight in step.trainable())
    moments = 2 * sum(weight.numel() * 4 for weight in step.trainable())
    left = max(0, KEPT + 1 - checkpoints.count())
    require_room(checkpoints.folder, left * (weights + moments) + weights)


class _Bar:
    """Progress bar and speed of a training."""

    def __init__(self, run: Run, updates: int) -> None:
        self._run, self._updates = run, updates
        self._warm: tuple[float, int] | None = None
        self._bar: Any = None

    def __enter__(self) -> None:
        """Wait for the first update."""

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show an update; the clock starts after the first, which compiles and warms up."""
        if self._bar is None:
            self._warm = time.monotonic(), progress.tokens
            initial = progress.update - 1
            self._bar = progress_bar(total=self._updates, initial=initial, unit="update")
        loss, rate = progress.losses[-1], self.tok_per_s(progress)
        self._bar.set_postfix(loss=f"{loss:.3f}", tok_per_s=rate, refresh=False)
        self._bar.update(progress.update - self._bar.n)
        self._run.report_progress(
            done=progress.update, total=self._updates, loss=loss, tok_per_s=rate
        )

    def tok_per_s(self, progress: Progress) -> float | None:
        """Real tokens per second since the first update of this process; None before the second."""
        began, tokens = self._warm or (0.0, progress.tokens)
        if progress.tokens == tokens:
            return None
        return round((progress.tokens - tokens) / (time.monotonic() - began), 1)


@contextlib.contextmanager
def _ends_saved(
    run: Run, job: Job, plan: Plan, loop: TrainingLoop, batches: _Batches
) -> Iterator[None]:
    """Save the last finished update after an error, and say what ended the training."""
    try:
        yield
    except NotFiniteError as error:
        loop.save_finished()
        base = base_of(loop.step.model)
        rows = batches.names(error.update - 1, error.micro_batches)
        raise StageError(
            f"{error}; {_saved(loop)}\n  its rows: {'; '.join(rows)}",
            fix=finite_again(
                run.recipe,
                error.update,
                device=job.host.device,
                is_float16=base.dtype is torch.float16,
                model_type=base.config.model_type,
            ),
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        loop.save_finished()
        peak = torch.cuda.max_memory_allocated() if job.host.device == "cuda" else None
        what = f"no memory is left; {_saved(loop)}"
        raise out_of_memory(run.recipe, plan, what, peak) from error


def _saved(loop: TrainingLoop) -> str:
    """Say which update is on disk."""
    update = loop.progress.update
    if loop.checkpoints.has(update):
        return f"update {update} is saved"
    return "the last checkpoint stays" if loop.checkpoints.count() else "none was finished before"


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


def _save(model: nn.Module, folder: Path) -> None:
    """Write the trained weights to a temporary folder, then rename it."""
    temporary = folder / f".{ADAPTER}"
    for old in (temporary, folder / ADAPTER):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(temporary)  # type: ignore[operator]
    temporary.rename(folder / ADAPTER)
