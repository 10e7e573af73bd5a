"""Stage `plan`: what the run needs, what the host has, and the choice."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from strixft.catalog.hosts import THIS_MACHINE, Budget, Host, Sourced
from strixft.catalog.methods import METHODS
from strixft.guard.host import budget_for, find_host
from strixft.model.adapter import find_targets
from strixft.model.architecture import architecture_of
from strixft.model.config import first_lines, warnings_of
from strixft.model.load import load_config
from strixft.model.shapes import shape_base
from strixft.plan import show
from strixft.plan.advice import advise, cause, share_figures
from strixft.plan.choose import Choice, choose
from strixft.plan.data_shape import DataShape
from strixft.plan.dry_run import require_all_weights
from strixft.plan.exportable import require_exportable
from strixft.plan.measure import Correction, load_correction, measure, save_correction
from strixft.plan.phases import PROCESS, Phase, PhasePeaks, phases
from strixft.prepare.stage import Prepared, require_known_tokens
from strixft.probe.checks import probe_attention, require_device_works
from strixft.probe.job import Job
from strixft.recipe.schema import Recipe
from strixft.run.folder import Result, Run, resume_command
from strixft.step.update import StepOptions
from strixft.support.errors import FitError, RecipeError, StageError, StrixftError
from strixft.support.units import format_gib


@dataclass(frozen=True, kw_only=True)
class Plan(Result):
    """The memory-fit check and the choice that training follows."""

    name: ClassVar[str] = "plan"

    def is_final(self) -> bool:
        """A run that does not fit is planned again next time: memory may be free by then."""
        return bool(self.figures["fits"])

    def _repr_html_(self) -> str:
        return show.plan_html(self.figures)

    def require_fit(self) -> None:
        """Raise if the run does not fit.

        Raises:
            FitError: With what is needed, what is there, and what helps.
        """
        require_fit(self.figures)

    def require_same_config(self, recipe: Recipe) -> None:
        """Raise if the model's configuration is no longer the one that was planned.

        A plan may be made from the file that ships; the model's own comes with its weights.

        Raises:
            StageError: It is another one.
        """
        if self.inputs.get("config") not in (None, _digest(load_config(recipe))):
            raise StageError(
                f"the config.json of {recipe.model} is not the one that the plan was made from",
                fix=f"{resume_command(self.folder.parent)} --from plan",
            )


def require_fit(figures: dict[str, Any]) -> None:
    """Raise `FitError` if a plan's figures do not fit."""
    if figures["fits"]:
        return
    if figures["boxes"]:
        raise _no_share_fits(figures)
    host = figures["host"]
    because = cause(figures["parts"], host["budget_bytes"])
    helps = [row["change"] for row in figures["advice"] if row["fits"]]
    raise FitError(
        f"the run needs {format_gib(figures['reserved_bytes'])} and {host['name']} has"
        f" {format_gib(host['budget_bytes'])} for it; {because}",
        fix="; or ".join(helps) or "a smaller model, or a host with more memory",
    )


def _digest(config: Any) -> str:
    """Of what a configuration says of the model."""
    said = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _no_share_fits(figures: dict[str, Any]) -> FitError:
    host, boxes = figures["host"], figures["boxes"]
    needs = " and ".join(
        f"{format_gib(share['device_bytes'])} by {share['way']}" for share in boxes["shares"]
    )
    return FitError(
        f"each of {boxes['count']} machines needs {needs}, and {host['name']} has"
        f" {format_gib(host['budget_bytes'])} for it",
        fix=f"--boxes {2 * boxes['count']}, or a smaller model",
    )


@contextlib.contextmanager
def _named(recipe: Recipe, config: Any) -> Iterator[None]:
    """A step of a model that nobody tried may fail in its own ways."""
    try:
        yield
    except StrixftError:
        raise
    except Exception as error:
        raise StageError(
            f"strixft failed to plan {recipe.model}, a {config.model_type}: its training step, run"
            f" without weights, says: {first_lines(error)}",
            fix="--set train.compile=none, which asks less of the model's code; and report what"
            " --debug shows: this says nothing against the model",
        ) from error


def _choice(chosen: Choice, options: StepOptions) -> dict[str, Any]:
    run = chosen.run
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
    }


def _assumption(what: str, number: Sourced | None) -> dict[str, Any]:
    if number is None:
        return {"what": what, "value": None, "mark": None, "source": "not known for this host"}
    return {"what": what, **asdict(number)}


def _assumptions(job: Job, limit: Budget) -> list[dict[str, Any]]:
    host = job.host
    rates = host.matmul_flop_per_s.items()
    return [
        {"what": "budget_bytes", "value": limit.num_bytes, "mark": None, "source": limit.source},
        _assumption("workspace_bytes", host.workspace_bytes),
        _assumption("outside_bytes", host.outside_bytes),
        _assumption("host_bytes of a process", PROCESS),
        _assumption("bandwidth_bytes_per_s", host.bandwidth_bytes_per_s),
        *(_assumption(f"matmul_flop_per_s, {dtype}", rate) for dtype, rate in rates),
        _assumption("launch_s of an operator", host.launch_s),
        _assumption("python_s of a micro-batch", host.python_s),
        _assumption("gap_s between two kernels", host.gap_s),
        _assumption("unpack_share of the bandwidth, 4-bit", host.unpack_share),
        _assumption("the same in compiled layers", host.compiled_unpack_share),
        *_attention(job),
    ]


def _attention(job: Job) -> Iterator[dict[str, Any]]:
    """The way that was chosen, and what this machine said of those that could not be."""
    host, options = job.host, job.options
    if not host.here:
        source = f"{options.backend.why}; not probed on {host.name}"
        yield {"what": "attention", "value": options.attention, "mark": None, "source": source}
        return
    for verdict in probe_attention(job.architecture.heads, host):
        chosen, tried = verdict.backend.name == options.attention, verdict.outcome != "no way"
        if chosen or (tried and verdict.outcome != "right"):
            yield {
                "what": "attention" if chosen else "attention that is not used",
                "value": verdict.backend.name,
                "mark": "measured",
                "source": f"probed here: {verdict.reason}",
            }


def _require_this_machine(name: str) -> None:
    if name not in THIS_MACHINE:
        raise RecipeError(
            f"--measure runs on this machine, it cannot measure {name}",
            fix="--host auto --measure",
        )


def _require_positions(recipe: Recipe, config: Any) -> None:
    """Refuse rows that are longer than a table of learned positions."""
    most, asked = architecture_of(config).positions, recipe.dataset.max_length
    if most is not None and asked > most:
        raise RecipeError(
            f"rows may have {asked:,} tokens, and {recipe.model} looks positions up in a table that"
            f" ends at {most:,}",
            fix=f"--set dataset.max_length={most}",
        )


def _without_adapter(recipe: Recipe, config: Any) -> Iterator[str]:
    """Layers that `all-linear` leaves as they are."""
    if METHODS[recipe.method].adapter != "none":
        whole = shape_base(config, METHODS["full"], torch.bfloat16)
        idle = architecture_of(config).idle
        for told in find_targets(whole, recipe.lora.target_modules, idle).left_out:
            yield f"no adapter for {told}"


FEW_UPDATES = 50


def _require_master_weights(recipe: Recipe, host: Host) -> None:
    if METHODS[recipe.method].adapter == "none" and host.device == "cuda" and not host.bfloat16:
        raise RecipeError(
            f"method: {recipe.method} trains weights in float16 on {host.name}, which has no bf16:"
            " small updates would be lost, and scaled gradients cannot be undone",
            fix="--set method=lora",
        )


def _few(recipe: Recipe, updates: int | None) -> Iterator[str]:
    if recipe.train.tokens_per_update == "auto" and updates and updates < FEW_UPDATES:
        yield f"only {updates} updates, of at least a row each: more rows, or --set train.epochs=…"


def _warnings(peaks: dict[str, Phase], limit: Budget, known: Correction) -> Iterator[str]:
    """What was not measured, and phases other than training that need more than there is."""
    if known.source and known.peak is None:
        yield "memory was not measured: a CPU has no allocator to ask; the time was"
    if known.source and known.seconds is None:
        yield "the time is not corrected: no rates are known that it could be predicted with"
    for name, phase in peaks.items():
        if name != "train" and phase["device_bytes"] > limit.num_bytes:
            yield f"{name} may need {format_gib(phase['device_bytes'])}, more than the budget"


def _times(recipe: Recipe, chosen: Choice, data: DataShape) -> dict[str, float | None]:
    run, per_update = chosen.run, chosen.run.seconds_per_update
    rows = run.shape.rows * run.steps
    updates = data.num_rows(recipe) / rows if data.lengths else None
    return {
        "tok_per_s": rows * data.mean_length() / per_update if per_update else None,
        "seconds_per_update": per_update,
        "seconds_total": per_update * updates if per_update and updates else None,
    }


def plan_figures(
    recipe: Recipe,
    host_name: str | None = None,
    prepared: Prepared | None = None,
    boxes: int = 1,
    *,
    measured: bool = False,
) -> dict[str, Any]:
    """The plan's figures.

    Args:
        recipe: What to run.
        host_name: Another host than the recipe's.
        prepared: The prepared data; without them rows are as long as `max_length`.
        boxes: Machines that share the run.
        measured: Run small models on this device first, and correct the plan by them.
    """
    name = host_name or recipe.memory.host
    if measured:
        _require_this_machine(name)
    host = find_host(name)
    limit = budget_for(recipe.memory, host)
    _require_master_weights(recipe, host)
    config = load_config(recipe)
    _require_positions(recipe, config)
    if host.here:
        require_device_works(architecture_of(config).heads, METHODS[recipe.method], host)
    job = Job.of(recipe, config, host)
    data = DataShape.of(recipe, prepared, packed=job.options.backend.packed)
    with _named(recipe, config):
        chosen = choose(job, limit, data)
        require_all_weights(job, chosen.run)
    if measured:
        save_correction(job, measure(job, limit, chosen.run))
        chosen = choose(job, limit, data)
    known = load_correction(job)
    run = chosen.run
    updates = data.updates(recipe, run.shape.rows)
    life = PhasePeaks(job, run)
    evaluated_rows = life.evaluated_rows(limit.num_bytes)
    peaks = phases(life, evaluated_rows)
    shared = boxes != 1 and share_figures(job, limit, data, boxes)
    advice = [] if chosen.fits or shared else advise(job, limit.num_bytes, data)
    return {
        "fits": any(share["fits"] for share in shared["shares"]) if shared else chosen.fits,
        "host": {"name": host.name, "budget_bytes": limit.num_bytes, "source": limit.source},
        "peak_bytes": run.peak_bytes,
        "reserved_bytes": run.reserved_bytes,
        "outside_bytes": int(host.outside_bytes.value),
        "parts": run.parts,
        "phases": peaks,
        "boxes": shared or None,
        "choice": {**_choice(chosen, job.options), "evaluated_rows": evaluated_rows},
        "tokens_per_update": data.tokens_per_update(recipe),
        "updates": updates,
        **_times(recipe, chosen, data),
        "frontier": [asdict(candidate) for candidate in chosen.frontier],
        "assumptions": [
            *_assumptions(job, limit),
            *known.assumptions(),
        ],
        "advice": [asdict(row) for row in advice],
        "warnings": [
            *warnings_of(config, data.max_length),
            *_without_adapter(recipe, config),
            *_few(recipe, updates),
            *_warnings(peaks, limit, known),
        ],
    }


def _plan(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared = run.require(Prepared)
    require_known_tokens(run.recipe, prepared)
    config = _digest(load_config(run.recipe))
    inputs = {"rows_sha256": prepared.inputs["rows_sha256"], "config": config}
    figures = plan_figures(run.recipe, prepared=prepared)
    figures["warnings"] += require_exportable(run.recipe)
    return inputs, figures


def plan_recipe(run: Run) -> Plan:
    """Plan a prepared run on its host; written to the run folder once it fits."""
    return run.once(Plan, lambda folder: _plan(run, folder))
