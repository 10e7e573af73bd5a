"""Stage `evaluate`: base against tuned on the rows that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from torch import nn

from strixft.data.end_tokens import Ends
from strixft.data.general import general_rows
from strixft.evaluate import show
from strixft.evaluate.experts import compare_experts
from strixft.evaluate.generate import generate, prompt_tokens
from strixft.evaluate.harness import (
    TaskScores,
    check_tasks,
    compare_tasks,
    load_tasks,
    rows_at_once,
    run_tasks,
)
from strixft.evaluate.judge import Judged, judge_answers
from strixft.evaluate.losses import row_losses
from strixft.evaluate.metrics import choose_metrics, paired_change, require_libraries, scores
from strixft.evaluate.variants import VARIANTS, load_variants
from strixft.guard.host import cap, device_type
from strixft.guard.stage_watches import StageWatch
from strixft.model.adapter import base_of
from strixft.model.expert_counts import counting
from strixft.model.experts import fused_experts
from strixft.model.source import load_tokenizer
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe
from strixft.run.folder import Result, Run
from strixft.step.memory_tracker import release_memory
from strixft.support.errors import DataError
from strixft.support.files import cache_folder, digest
from strixft.train.stage import ADAPTER, Trained

ANSWER_ROOM = 8
"""Tokens an answer may have beyond the longest reference."""

SHOWN_WORST = 5

LARGEST_LOSS = 700.0
"""Above it, a perplexity is larger than any float."""

HeldOut = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluated(Result):
    """Measures of base and tuned on the same held-out rows."""

    name: ClassVar[str] = "evaluate"

    def _repr_html_(self) -> str:
        return show.page(self.figures)

    @property
    def judged(self) -> Judged | None:
        """Verdicts of the judge; None if the recipe has none."""
        found = self.figures.get("judge")
        return Judged(found, self.figures["answers"]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """The data and limits with which both variants are measured."""

    recipe: Recipe
    plan: Mapping[str, Any]
    """Figures of the plan."""
    tokenizer: Any
    ends: Ends
    rows: HeldOut
    """Held out; they are on disk and read as they are needed."""
    answered: HeldOut
    """The first of them, which are answered in full."""
    general: HeldOut
    metrics: Sequence[str]
    tasks: Any
    """The task manager of lm-eval; None without tasks."""
    watch: StageWatch


@dataclass(frozen=True, slots=True)
class Measured:
    """Measures of one variant."""

    losses: list[float]
    general: list[float]
    experts: dict[str, list[float]]
    """Share of the held-out tokens that reached each expert, by module; empty without experts."""
    answers: list[str]
    prompted: list[str]
    tasks: TaskScores
    speed: dict[str, Any]


def check_evaluation(recipe: Recipe) -> None:
    """Check before a night of training that the evaluation can run.

    Raises:
        HostError: A library of the extra `eval` is not installed.
        RecipeError: lm-eval has no such task.
    """
    require_libraries(recipe.evaluate.metrics)
    check_tasks(recipe)


def require_held_out(prepared: Prepared) -> None:
    """Check after the preparation that there are rows to evaluate on.

    Raises:
        DataError: No rows are held out.
    """
    if prepared.figures["rows_validation"]:
        return
    several = prepared.figures["rows_train"] > 1
    more = "--set dataset.validation_fraction=0.05 --from prepare" if several else "more rows"
    raise DataError(
        "no rows are held out, so there is nothing to evaluate on",
        fix=f"{more}, or --to train   trains without an evaluation",
        settings={"dataset.validation_fraction": 0.05} if several else {},
    )


def evaluate_recipe(run: Run) -> Evaluated:
    """Measure base and tuned on the held-out rows.

    Raises:
        StageError: An earlier stage has not run.
        DataError: No rows are held out.
        HostError: A library of the extra `eval` is not installed.
        RecipeError: lm-eval has no such task, or its data cannot be loaded.
        FitError: The host is about to run out of memory.
    """
    return run.once(Evaluated, lambda _: _evaluate(run))


def _evaluate(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs and figures of the stage."""
    prepared, trained, plan = run.require(Prepared), run.require(Trained), run.require(Plan)
    require_held_out(prepared)
    trained.require_same_base(run.recipe)
    recipe, adapter = run.recipe, trained.folder / ADAPTER
    rows = prepared.token_rows(recipe.dataset).validation
    answered = [rows[index] for index in range(min(len(rows), recipe.evaluate.max_rows))]
    metrics, because = choose_metrics(recipe.evaluate.metrics, [row["answer"] for row in answered])
    tokenizer = load_tokenizer(recipe)
    job = EvaluationJob(
        recipe=recipe,
        plan=plan.figures,
        tokenizer=tokenizer,
        ends=prepared.ends(tokenizer),
        rows=rows,
        answered=answered,
        general=general_rows(tokenizer),
        metrics=metrics,
        tasks=load_tasks(recipe),
        watch=StageWatch(run),
    )
    phases = [plan.figures["phases"][name]["device_bytes"] for name in ("evaluate", "generate")]
    capped = cap(plan.figures["host"]["budget_bytes"], planned := max(map(int, phases)))
    with job.watch.watching_memory() as seen:
        measured = _measure_variants(job, adapter)
    means, changes = _compare(job, measured)
    on_gpu = device_type() == "cuda"
    prompts = [{"prompt": text} for text in recipe.evaluate.prompts]
    figures = {
        "metrics": means,
        "changes": changes,
        "metrics_because": because,
        "weights": trained.weights,
        "rows_loss": len(rows),
        "rows_answered": len(answered),
        "speed": _both(measured, "speed"),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "planned_bytes": planned,
        "resident_bytes": psutil.Process().memory_info().rss,
        **seen,
        "cap": capped.says,
        "general": _general(job.general, measured),
        "experts": compare_experts(_both(measured, "experts")),
        "tasks": compare_tasks(_both(measured, "tasks"), recipe.train.seed),
        **_worst(rows, measured),
        "prompts": _beside(prompts, _both(measured, "prompted")),
        "answers": _beside(list(map(_shown, answered)), _both(measured, "answers")),
    }
    if recipe.evaluate.judge is not None:
        release_memory()  # a judge on the same device needs the room
        figures["judge"] = judge_answers(recipe, figures["answers"], cache_folder())
    hashes = {file.name: digest(file) for file in sorted(adapter.glob("*.safetensors"))}
    return {"adapter_sha256": hashes}, figures


def _measure_variants(job: EvaluationJob, adapter: Path) -> dict[str, Measured]:
    if device_type() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    measured = {}
    model: Any
    for variant, model in load_variants(job.recipe, adapter):
        # lm-eval's tasks generate by the model's own settings
        model.generation_config.eos_token_id = list(job.ends.token_ids) or None
        measured[variant] = _measure(job, model)
        del model  # the next one may need its place
    return measured


def _measure(job: EvaluationJob, model: nn.Module) -> Measured:
    """Measure losses, answers and tasks of one variant."""
    asked, look, began = job.recipe.evaluate, job.watch.look, time.monotonic()
    choice = job.plan["choice"]
    room = int(choice["evaluated_rows"] * choice["max_length"])  # tokens of a batch, as planned

    def answers(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        return generate(model, job.tokenizer, job.ends, prompts, most, room, look=look)

    def decoded(tokens: Sequence[Sequence[int]]) -> list[str]:
        return [job.ends.text(job.tokenizer, answer).strip() for answer in tokens]

    with counting(fused_experts(base_of(model))) as counts:
        losses = row_losses(model, job.rows, room, look)
    loss_seconds = time.monotonic() - began
    general = row_losses(model, job.general, room, look)
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in job.answered]
    most = max(len(row["input_ids"]) - row["prompt_tokens"] for row in job.answered)
    answer_began = time.monotonic()
    tokens = answers(prompts, most + ANSWER_ROOM)
    count, answer_seconds = sum(map(len, tokens)), time.monotonic() - answer_began
    kwargs = job.recipe.dataset.chat_template_kwargs
    own = [prompt_tokens(job.tokenizer, text, kwargs) for text in asked.prompts]
    prompted = decoded(answers(own, asked.prompt_answer_tokens))
    tasks: TaskScores = {}
    if job.tasks is not None:
        at_once = rows_at_once(job.plan, len(job.tokenizer))
        tasks = run_tasks(job.tasks, job.recipe, model, job.tokenizer, at_once)
    speed = {
        "answer_tokens": count,
        "answer_tok_per_s": round(count / answer_seconds, 1),
        "loss_seconds": round(loss_seconds, 3),
        "seconds": round(time.monotonic() - began, 3),
    }
    return Measured(losses, general, counts.shares(), decoded(tokens), prompted, tasks, speed)


def _trained_tokens(rows: HeldOut) -> list[float]:
    return [float(sum(row["trained"])) for row in rows]


def _both(measured: Mapping[str, Measured], name: str) -> dict[str, Any]:
    """Return one measure of both variants."""
    return {variant: getattr(measured[variant], name) for variant in VARIANTS}


def _compare(
    job: EvaluationJob, measured: Mapping[str, Measured]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return the means of both variants, and the changes with their intervals, by measure."""
    references = [row["answer"] for row in job.answered]
    pattern, seed = job.recipe.evaluate.pattern, job.recipe.train.seed
    values: dict[str, tuple[dict[str, list[float]], list[float] | None]] = {
        "loss": (_both(measured, "losses"), _trained_tokens(job.rows)),
        "general_loss": (_both(measured, "general"), _trained_tokens(job.general)),
    }
    for name in job.metrics:
        scored = {v: scores(name, measured[v].answers, references, pattern) for v in VARIANTS}
        values[name] = scored, None
    means = {
        name: {v: float(np.average(of[v], weights=weights)) for v in VARIANTS}
        for name, (of, weights) in values.items()
    }
    changes = {
        name: paired_change(of["base"], of["tuned"], weights, seed)
        for name, (of, weights) in values.items()
    }
    loss = means.pop("loss")
    perplexity = {v: math.exp(min(loss[v], LARGEST_LOSS)) for v in VARIANTS}
    return {"loss": loss, "perplexity": perplexity, **means}, changes


def _general(rows: HeldOut, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the loss on general texts by kind."""
    weights, kinds = _trained_tokens(rows), np.array([row["kind"] for row in rows])
    by_kind = {}
    for kind in dict.fromkeys(kinds.tolist()):
        own = np.where(kinds == kind, weights, 0)  # weights of the texts of this kind
        by_kind[kind] = {v: float(np.average(measured[v].general, weights=own)) for v in VARIANTS}
    return {"texts": len(rows), "tokens": round(sum(weights)), "kinds": by_kind}


def _worst(rows: HeldOut, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the rows whose loss rose most, with their text."""
    losses = _both(measured, "losses")
    pairs = zip(losses["base"], losses["tuned"], strict=True)
    rises = sorted(((tuned - base, i) for i, (base, tuned) in enumerate(pairs)), reverse=True)
    worse = [index for rise, index in rises if rise > 0]
    listed = [
        {**_shown(rows[index]), **{v: losses[v][index] for v in VARIANTS}}
        for index in worse[:SHOWN_WORST]
    ]
    return {"rows_worse": len(worse), "worst": listed}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"row": row["row"], "request": row["request"], "reference": row["answer"]}


def _beside(
    texts: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Put the answers of both variants beside the texts that they answer."""
    return [
        {**text, **{variant: answers[variant][index] for variant in VARIANTS}}
        for index, text in enumerate(texts)
    ]
