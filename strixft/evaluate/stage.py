"""Stage `evaluate`: base against tuned on the rows that were held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

from strixft.evaluate import show
from strixft.evaluate.general import general_rows
from strixft.evaluate.harness import check_tasks, compare_tasks, load_tasks
from strixft.evaluate.judge import Judged, judge_answers
from strixft.evaluate.losses import row_losses
from strixft.evaluate.measure import Rows, Side, Work, measure
from strixft.evaluate.metrics import chosen, paired_change, require_libraries, scores
from strixft.evaluate.variants import VARIANTS, load_variant, load_variants
from strixft.guard.cap import cap
from strixft.guard.host import device_type
from strixft.guard.stage_watches import StageWatch
from strixft.model.load import load_tokenizer
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe
from strixft.run.folder import Result, Run
from strixft.step.tracker import release_memory
from strixft.support.disk import cache_folder
from strixft.support.errors import DataError
from strixft.support.files import digest
from strixft.train.stage import ADAPTER, Trained

__all__ = ["Evaluated", "check_evaluation", "evaluate_recipe", "load_variant", "row_losses"]


SHOWN_WORST = 5

LARGEST_LOSS = 700.0
"""Above it, a perplexity is larger than any float."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Result):
    """Measures of base and tuned on the same held-out rows."""

    name: ClassVar[str] = "evaluate"

    def _repr_html_(self) -> str:
        return show.page(self.figures)

    @property
    def judged(self) -> Judged | None:
        """What the judge says; None where the recipe has none."""
        found = self.figures.get("judge")
        return Judged(found, self.figures["answers"]) if found else None


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    counts = weights or [1.0] * len(values)
    return sum(v * w for v, w in zip(values, counts, strict=True)) / sum(counts)


def _weights(rows: Rows) -> list[float]:
    """Trained tokens of each row."""
    return [float(sum(row["trained"])) for row in rows]


def _metrics(
    work: Work, found: Mapping[str, Side]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The measures of both sides, and the change from base to tuned with its interval."""
    references = [row["answer"] for row in work.answered]
    pattern, seed = work.recipe.evaluate.pattern, work.recipe.train.seed
    losses = {
        "loss": ({s: found[s].losses for s in VARIANTS}, _weights(work.rows)),
        "general_loss": ({s: found[s].general for s in VARIANTS}, _weights(work.general)),
    }
    answers = {
        name: ({s: scores(name, found[s].answers, references, pattern) for s in VARIANTS}, None)
        for name in work.metrics
    }
    values: dict[str, tuple[dict[str, list[float]], list[float] | None]] = {**losses, **answers}
    means = {
        name: {s: _mean(v[s], counts) for s in VARIANTS} for name, (v, counts) in values.items()
    }
    changes = {
        name: paired_change(v["base"], v["tuned"], counts, seed)
        for name, (v, counts) in values.items()
    }
    perplexity = {s: math.exp(min(loss, LARGEST_LOSS)) for s, loss in means["loss"].items()}
    return {"loss": means.pop("loss"), "perplexity": perplexity, **means}, changes


def _worst(found: Mapping[str, Side], rows: Rows) -> dict[str, Any]:
    """The rows whose loss rose most, with their text."""
    pairs = zip(found["base"].losses, found["tuned"].losses, strict=True)
    rises = sorted(((tuned - base, i) for i, (base, tuned) in enumerate(pairs)), reverse=True)
    worse = [(rise, index) for rise, index in rises if rise > 0]
    listed = [
        {**_told(rows[index]), **{side: found[side].losses[index] for side in VARIANTS}}
        for _, index in worse[:SHOWN_WORST]
    ]
    return {"rows_worse": len(worse), "worst": listed}


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"row": row["row"], "request": row["request"], "reference": row["answer"]}


def _general(found: Mapping[str, Side], rows: Rows) -> dict[str, Any]:
    """Loss on general texts, by kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    by_kind = {}
    for kind in kinds:
        own = [index for index, row in enumerate(rows) if row["kind"] == kind]
        counts = _weights([rows[index] for index in own])
        by_kind[kind] = {s: _mean([found[s].general[i] for i in own], counts) for s in VARIANTS}
    return {"texts": len(rows), "tokens": round(sum(_weights(rows))), "kinds": by_kind}


def _side_by_side(texts: Rows, answers: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {**text, **{side: answers[side][index] for side in VARIANTS}}
        for index, text in enumerate(texts)
    ]


def check_evaluation(recipe: Recipe) -> None:
    """Say now what would stop the evaluation after a night of training.

    Raises:
        HostError: A library of the extra `eval` is not installed.
        RecipeError: lm-eval has no such task.
    """
    require_libraries(recipe.evaluate.metrics)
    check_tasks(recipe)


def require_held_out(prepared: Prepared) -> None:
    """Say after the preparation what would stop the evaluation after a night of training.

    Raises:
        DataError: No rows are held out.
    """
    if prepared.figures["rows_validation"]:
        return
    more = "--set dataset.validation_fraction=0.05 --from prepare"
    raise DataError(
        "no rows are held out, so there is nothing to evaluate on",
        fix=f"{more if prepared.figures['rows_train'] > 1 else 'more rows'}, or --to train"
        "   trains without an evaluation",
    )


def _needed_bytes(plan: Plan) -> int:
    phases = plan.figures["phases"]
    return max(int(phases[name]["device_bytes"]) for name in ("evaluate", "generate"))


def _memory(plan: Plan) -> dict[str, Any]:
    on_gpu = device_type() == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "planned_bytes": _needed_bytes(plan),
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def _sides(work: Work, folder: Path) -> dict[str, Side]:
    if device_type() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = {}
    model: Any
    for side, model in load_variants(work.recipe, folder):
        # lm-eval's tasks generate by the model's own settings
        model.generation_config.eos_token_id = list(work.ends.token_ids) or None
        found[side] = measure(work, model)
        del model  # the next one may need its place
    return found


def _evaluate(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, trained, plan = run.require(Prepared), run.require(Trained), run.require(Plan)
    require_held_out(prepared)
    trained.require_same_base(run.recipe)
    recipe, rows = run.recipe, prepared.token_rows(run.recipe.dataset).validation
    references = rows["answer"][: recipe.evaluate.max_rows]
    names, why = chosen(recipe.evaluate.metrics, references)
    tokenizer, watch = load_tokenizer(recipe), StageWatch(run)
    tasks, general = load_tasks(recipe), general_rows(tokenizer)
    ends = prepared.ends(tokenizer)
    work = Work(recipe, plan, tokenizer, ends, rows, general, names, tasks, watch)
    capped = cap(plan.figures["host"]["budget_bytes"], _needed_bytes(plan))
    with watch.watching_memory() as seen:
        found = _sides(work, trained.folder / ADAPTER)
    metrics, changes = _metrics(work, found)
    told = [_told(row) for row in work.answered]
    asked = [{"prompt": text} for text in recipe.evaluate.prompts]
    figures = {
        "metrics": metrics,
        "changes": changes,
        "metrics_because": why,
        "rows_loss": len(rows),
        "rows_answered": len(told),
        "speed": {side: found[side].speed for side in VARIANTS},
        **_memory(plan),
        **seen,
        "cap": capped.says,
        "general": _general(found, general),
        "tasks": compare_tasks({s: found[s].tasks for s in VARIANTS}, recipe.train.seed),
        **_worst(found, rows),
        "prompts": _side_by_side(asked, {s: found[s].prompted for s in VARIANTS}),
        "answers": _side_by_side(told, {s: found[s].answers for s in VARIANTS}),
    }
    if run.recipe.evaluate.judge is not None:
        release_memory()  # a judge on the same device needs the room
        figures["judge"] = judge_answers(run.recipe, figures["answers"], cache_folder())
    return {"adapter_sha256": _adapter_digest(trained.folder / ADAPTER)}, figures


def _adapter_digest(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))}


def evaluate_recipe(run: Run) -> Evaluated:
    """Measure base and tuned on the held-out rows.

    Raises:
        StageError: An earlier stage has not run.
        DataError: No rows are held out.
        HostError: A library of the extra `eval` is not installed.
        RecipeError: lm-eval has no such task, or its data cannot be had.
        FitError: The host is about to run out of memory.
    """
    return run.once(Evaluated, lambda folder: _evaluate(run, folder))
