"""Stage `plan`: what the run needs, what the host has, and the choice."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from strixft.catalog.hosts import THIS_MACHINE, Budget, Host, Sourced
from strixft.catalog.methods import METHODS
from strixft.catalog.target_kernels import failing_kernels
from strixft.catalog.trackers import require_trackers
from strixft.guard.host import budget_for, find_host
from strixft.model.architecture import architecture_of
from strixft.model.config import first_lines, warnings_of
from strixft.model.load import require_stored, shape_base
from strixft.model.source import load_config
from strixft.model.targets import adapted_layers, find_targets
from strixft.plan import show
from strixft.plan.advice import advise, cause, share_figures
from strixft.plan.choose import Choice, DataShape, choose
from strixft.plan.dry_run import require_all_weights
from strixft.plan.held_out import held_out_figures
from strixft.plan.measure import Correction, load_correction, measure, save_correction
from strixft.plan.phase_peaks import PROCESS, Phase, PhasePeaks, phases
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.run.first_weights import first_weights
from strixft.run.folder import Result, Run, resume_command
from strixft.support.errors import FitError, RecipeError, StageError, StrixftError
from strixft.support.private_hf import NAME_OF_CONFIG
from strixft.support.units import format_gib

if TYPE_CHECKING:
    from strixft.prepare.stage import Prepared

FEW_UPDATES = 50


@dataclass(frozen=True, kw_only=True)
class Plan(Result):
    """The memory-fit check and the choice that training follows."""

    name: ClassVar[str] = "plan"

    def refusal(self) -> FitError | None:
        """Return the error of a run that does not fit; later there may be more memory."""
        return misfit(self.figures)

    def _repr_html_(self) -> str:
        return show.plan_html(self.figures)

    def require_fit(self) -> None:
        """Raise `FitError` if the run does not fit; see `require_fit`."""
        require_fit(self.figures)

    def require_same_config(self, recipe: Recipe) -> None:
        """Raise if the model's configuration is not the one that was planned.

        A plan may be made from the file that ships; the model's own comes with its weights.

        Raises:
            StageError: It is another one.
        """
        if self.inputs.get("config") not in (None, _digest(load_config(recipe))):
            raise StageError(
                f"the config.json of {recipe.model} is not the one that the plan was made from",
                fix=f"{resume_command(self.folder.parent)} --from plan",
            )


def _digest(config: Any) -> str:
    """Return a digest of what a configuration says of the model."""
    said = config.to_dict()
    for name in (NAME_OF_CONFIG, "transformers_version"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def require_fit(figures: dict[str, Any]) -> None:
    """Raise if a plan does not fit.

    Raises:
        FitError: With what is needed, what is there, and what helps.
    """
    if (error := misfit(figures)) is not None:
        raise error


def misfit(figures: dict[str, Any]) -> FitError | None:
    """Return the error of a plan that does not fit, or None."""
    if figures["fits"]:
        return None
    host, boxes = figures["host"], figures["boxes"]
    there = f"{host['name']} has {format_gib(host['budget_bytes'])} for it"
    if boxes:
        needs = " and ".join(
            f"{format_gib(share['device_bytes'])} by {share['way']}" for share in boxes["shares"]
        )
        return FitError(
            f"each of {boxes['count']} machines needs {needs}, and {there}",
            fix=f"--boxes {2 * boxes['count']}, or a smaller model",
        )
    helps = [row for row in figures["advice"] if row["fits"]]
    return FitError(
        f"the run needs {format_gib(figures['reserved_bytes'])} and {there};"
        f" {cause(figures['parts'], host['budget_bytes'])}",
        fix="; or ".join(row["change"] for row in helps)
        or "a smaller model, or a host with more memory",
        settings=helps[0]["settings"] if helps else None,
    )


def plan_recipe(run: Run) -> Plan:
    """Plan a prepared run on its host; written to the run folder once it fits."""
    return run.once(Plan, lambda folder: _plan(run, folder))


def _plan(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from strixft.plan.exportable import require_exportable
    from strixft.prepare.stage import Prepared, require_known_tokens

    prepared = run.require(Prepared)
    require_known_tokens(run.recipe, prepared)
    require_trackers(run.recipe.train.trackers, offline=run.recipe.offline)
    config = _digest(load_config(run.recipe))
    inputs = {"rows_sha256": prepared.inputs["rows_sha256"], "config": config}
    figures = plan_figures(run.recipe, prepared=prepared)
    figures["warnings"] += require_exportable(run.recipe)
    return inputs, figures


def plan_figures(
    recipe: Recipe,
    host_name: str | None = None,
    prepared: Prepared | None = None,
    boxes: int = 1,
    *,
    measured: bool = False,
) -> dict[str, Any]:
    """Return the plan's figures.

    Args:
        recipe: The recipe to plan.
        host_name: Another host than the recipe's.
        prepared: The prepared data; without them rows are as long as `max_length`.
        boxes: Machines that share the run.
        measured: Run small models on this device first, and correct the plan by them.
    """
    job = checked_job(recipe, host_name or recipe.memory.host, measured=measured)
    limit = budget_for(recipe.memory, job.host)
    data = DataShape.of(recipe, prepared, packed=job.options.backend.packed)
    with _named(job):
        chosen = choose(job, limit, data)
        require_all_weights(job, chosen.run)
    if measured:
        save_correction(job, measure(job, limit, chosen.run))
        chosen = choose(job, limit, data)
    known, run = load_correction(job), chosen.run
    updates = data.updates(recipe, run.shape.rows)
    held_out = held_out_figures(recipe, run, updates, prepared)
    of_phases = PhasePeaks(job, run)
    evaluated_rows = of_phases.evaluated_rows(limit.num_bytes)
    peaks = phases(of_phases, evaluated_rows)
    shared = share_figures(job, limit, data, boxes) if boxes != 1 else None
    advice = [] if chosen.fits or shared else advise(job, limit.num_bytes, data)
    return {
        "fits": any(share["fits"] for share in shared["shares"]) if shared else chosen.fits,
        "host": {"name": job.host.name, "budget_bytes": limit.num_bytes, "source": limit.source},
        "peak_bytes": run.peak_bytes,
        "reserved_bytes": run.reserved_bytes,
        "outside_bytes": int(job.host.outside_bytes.value),
        "parts": run.parts,
        "phases": peaks,
        "boxes": shared,
        "packing": {"packed": job.options.backend.packed, "reason": job.unpacked_because},
        "kernels_off": dict(job.proof.bad_kernels),
        "choice": {**_choice(job, chosen), "evaluated_rows": evaluated_rows},
        "tokens_per_update": data.tokens_per_update(recipe),
        "updates": updates,
        **_times(recipe, chosen, data, held_out),
        "held_out": held_out,
        "frontier": [asdict(candidate) for candidate in chosen.frontier],
        "assumptions": [*_assumptions(job, limit), *known.assumptions()],
        "advice": [asdict(row) for row in advice],
        "warnings": [
            *warnings_of(job.config, data.max_length),
            *_warnings(job, updates, peaks, limit, known),
        ],
    }


def checked_job(recipe: Recipe, name: str, *, measured: bool = False) -> Job:
    """Return the job of a recipe on a host, unless they cannot go together."""
    if measured and name not in THIS_MACHINE:
        raise RecipeError(
            f"--measure runs on this machine, it cannot measure {name}",
            fix="--host auto --measure",
        )
    host = find_host(name)
    _require_master_weights(recipe, host)
    first_weights(recipe)
    config = load_config(recipe)
    require_stored(config, METHODS[recipe.method])
    _require_positions(recipe, config)
    if METHODS[recipe.method].adapter != "none":
        adapted_layers(recipe.lora, len(architecture_of(config).kinds))
    return Job.of(recipe, config, host)


def _require_master_weights(recipe: Recipe, host: Host) -> None:
    if METHODS[recipe.method].adapter == "none" and host.device == "cuda" and not host.bfloat16:
        raise RecipeError(
            f"method: {recipe.method} trains weights in float16 on {host.name}, which has no bf16:"
            " small updates would be lost, and scaled gradients cannot be undone",
            fix="--set method=lora",
            settings={"method": "lora"},
        )


def _require_positions(recipe: Recipe, config: Any) -> None:
    """Refuse rows that are longer than a table of learned positions."""
    most, asked = architecture_of(config).positions, recipe.dataset.max_length
    if most is not None and asked > most:
        raise RecipeError(
            f"rows may have {asked:,} tokens, and {recipe.model} looks positions up in a table that"
            f" ends at {most:,}",
            fix=f"--set dataset.max_length={most}",
            settings={"dataset.max_length": most},
        )


@contextlib.contextmanager
def _named(job: Job) -> Iterator[None]:
    """Name the model, where planning fails: one that nobody tried may fail in its own way."""
    try:
        yield
    except StrixftError:
        raise
    except Exception as error:
        raise StageError(
            f"strixft failed to plan {job.recipe.model}, a {job.config.model_type}: its training"
            f" step, run without weights, says: {first_lines(error)}",
            fix="--set train.compile=none, which asks less of the model's code; and report what"
            " --debug shows: this says nothing against the model",
            settings={"train.compile": "none"},
        ) from error


def _choice(job: Job, chosen: Choice) -> dict[str, Any]:
    run, options = chosen.run, job.options
    return {
        "micro_batch_rows": run.shape.rows,
        "max_length": run.shape.length,
        "recomputed_layers": run.recomputed_layers,
        "num_layers": run.num_layers,
        "gradient_accumulation_steps": run.steps,
        "attention": options.attention,
        "compiled": options.compiled,
        "elementwise": options.elementwise,
        "packed": asdict(run.shape.packed) if run.shape.packed else None,
        "trained_tokens": run.shape.trained,
    }


def _times(
    recipe: Recipe, chosen: Choice, data: DataShape, held_out: dict[str, Any] | None
) -> dict[str, float | None]:
    run, per_update = chosen.run, chosen.run.seconds_per_update
    rows = run.shape.rows * run.steps
    updates = data.num_rows(recipe, run.shape.rows) / rows if data.lengths else None
    between = (held_out or {}).get("seconds") or 0.0
    return {
        "tok_per_s": rows * data.mean_length() / per_update if per_update else None,
        "seconds_per_update": per_update,
        "seconds_total": per_update * updates + between if per_update and updates else None,
    }


def _assumptions(job: Job, limit: Budget) -> Iterator[dict[str, Any]]:
    """Yield the numbers that the plan takes from elsewhere, each with its source."""
    host = job.host
    yield {"what": "budget_bytes", "value": limit.num_bytes, "mark": None, "source": limit.source}
    numbers: dict[str, Sourced | None] = {
        "workspace_bytes": host.workspace_bytes,
        "outside_bytes": host.outside_bytes,
        "host_bytes of a process": PROCESS,
        "bandwidth_bytes_per_s": host.bandwidth_bytes_per_s,
        **{f"matmul_flop_per_s, {dtype}": n for dtype, n in host.matmul_flop_per_s.items()},
        "launch_s of an operator": host.launch_s,
        "python_s of a micro-batch": host.python_s,
        "gap_s between two kernels": host.gap_s,
        "unpack_share of the bandwidth, 4-bit": host.unpack_share,
        "the same in compiled layers": host.compiled_unpack_share,
    }
    unknown = {"value": None, "mark": None, "source": "not known for this host"}
    for what, number in numbers.items():
        yield {"what": what, **(asdict(number) if number else unknown)}
    yield from _attention(job)


def _attention(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the attention that was chosen, and why others that were tried here were not."""
    chosen = job.options.backend
    if not job.host.here:
        source = f"{chosen.why}; not probed on {job.host.name}"
        yield {"what": "attention", "value": chosen.name, "mark": None, "source": source}
    for verdict in job.verdicts:
        is_chosen = verdict.backend == chosen
        if is_chosen or verdict.outcome not in ("right", "unsupported"):
            yield {
                "what": "attention" if is_chosen else "attention that is not used",
                "value": verdict.backend.name,
                "mark": "measured",
                "source": f"probed here: {verdict.reason}",
            }


def _warnings(
    job: Job, updates: int | None, peaks: dict[str, Phase], limit: Budget, known: Correction
) -> Iterator[str]:
    """Yield what a user should know before training."""
    if reason := job.unpacked_because:
        yield f"rows are not packed, though dataset.packing is true: {reason}"
    if failing := failing_kernels(job.recipe.model, job.host.architecture):
        yield (
            f"{failing.failing} of {failing.configurations} kernels of this model's layers do not"
            f" compile for {job.host.architecture}, so train.compile: auto leaves layers as they"
            f" are: {failing.problem}"
        )
    for package, problem in job.proof.bad_kernels.items():
        yield f"kernels of {package} are not used, the plain path is: {problem}"
    if job.method.adapter != "none":
        whole = shape_base(job.config, METHODS["full"], torch.bfloat16)
        left_out = find_targets(whole, job.recipe.lora, job.architecture.idle)
        yield from (f"no adapter for {told}" for told in left_out.left_out)
    if job.recipe.train.tokens_per_update == "auto" and updates and updates < FEW_UPDATES:
        yield f"only {updates} updates, of at least a row each: more rows, or --set train.epochs=…"
    if known.source and known.peak is None:
        yield "memory was not measured: a CPU has no allocator to ask; the time was"
    if known.source and known.seconds is None:
        yield "the time is not corrected: no rates are known that it could be predicted with"
    for name, phase in peaks.items():
        if name != "train" and phase["device_bytes"] > limit.num_bytes:
            yield f"{name} may need {format_gib(phase['device_bytes'])}, more than the budget"
