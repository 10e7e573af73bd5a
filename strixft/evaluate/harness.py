"""Tasks of lm-eval (EleutherAI's evaluation harness) on base and tuned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from strixft.evaluate.metrics import paired_change
from strixft.evaluate.variants import VARIANTS
from strixft.model.adapter import base_of
from strixft.model.config import first_lines
from strixft.recipe.schema import Evaluate, Recipe
from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import did_you_mean

LONGEST = 4096
"""Tokens of a prompt; longer ones lose their beginning."""

LOGIT_BYTES = 8
"""Bytes of one logit: lm-eval keeps those of a whole batch in float32, and their log-softmax."""

TaskScores = dict[tuple[str, str], dict[int, float]]
"""Task and metric → number of the row → its score."""


@contextlib.contextmanager
def _offline(offline: bool) -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _manager(asked: Evaluate) -> Any:
    """Build the task manager from the recipe's folder, or from all tasks, which takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HostError(
            "evaluate.tasks needs lm-eval, which is not installed",
            fix="pip install 'strixft[eval]'",
        ) from error
    if asked.task_folder:
        own = TaskManager(include_path=asked.task_folder, include_defaults=False)
        if own.all_tasks and set(asked.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=asked.task_folder)


def check_tasks(recipe: Recipe) -> Any:
    """Return a manager of the recipe's tasks; None if it names none. Nothing is downloaded.

    Raises:
        HostError: lm-eval is not installed.
        RecipeError: There is no such task.
    """
    asked = recipe.evaluate
    if not asked.tasks:
        return None
    manager = _manager(asked)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise RecipeError(
                f"evaluate.tasks: lm-eval has no task {name!r}",
                fix=f"{near if near.startswith('did') else 'choose another'}"
                "   lm_eval ls tasks   lists them; evaluate.task_folder: … holds your own",
            )
    return manager


def load_tasks(recipe: Recipe) -> Any:
    """Return the manager of `check_tasks` and load the tasks' data, before any model is loaded.

    Raises:
        HostError: lm-eval is not installed.
        RecipeError: No such task, its data cannot be loaded, or it would run generated code.
    """
    manager = check_tasks(recipe)
    for name in recipe.evaluate.tasks:
        try:
            with _offline(recipe.offline):
                found = manager.load([name])["tasks"]
        except Exception as error:  # a task's own code may raise anything
            raise RecipeError(
                f"evaluate.tasks: {name!r} cannot be loaded: {first_lines(error)}",
                fix="the task needs the network, or its data in the cache; else leave it out",
            ) from error
        if any(getattr(task, "UNSAFE_CODE", False) for task in found.values()):
            raise RecipeError(
                f"evaluate.tasks: {name!r} runs code that the model writes",
                fix="leave it out here; lm_eval run --confirm_run_unsafe_code   in a container",
            )
    return manager


def rows_at_once(plan: Mapping[str, Any], vocabulary: int) -> int:
    """Return the rows of a batch whose logits fit beside the weights into the plan's budget.

    Args:
        plan: The plan's figures.
        vocabulary: Number of tokens that the model knows.
    """
    left = plan["host"]["budget_bytes"] - plan["phases"]["evaluate"]["device_bytes"]
    fit: int = left // (LOGIT_BYTES * vocabulary * LONGEST)
    return max(1, min(int(plan["choice"]["evaluated_rows"]), fit))


def run_tasks(
    manager: Any, recipe: Recipe, model: Any, tokenizer: Any, rows_at_once: int
) -> TaskScores:
    """Run the recipe's tasks on one model.

    Args:
        manager: Made by `load_tasks`.
        recipe: Names the tasks, and the number of rows of each.
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        rows_at_once: Rows of a batch.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    base = base_of(model)
    longest = min(LONGEST, getattr(base.config, "max_position_embeddings", LONGEST))
    wrapped = HFLM(
        pretrained=base, tokenizer=tokenizer, batch_size=rows_at_once, max_length=longest
    )
    with _offline(recipe.offline):
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(recipe.evaluate.tasks),
            task_manager=manager,
            limit=recipe.evaluate.task_rows,
            bootstrap_iters=0,  # our interval is over pairs
        )
    scores: TaskScores = {}
    for task, rows in found["samples"].items():
        for row in rows:
            for metric in row["metrics"]:
                score, suffix = row[metric], row["filter"]
                if isinstance(score, int | float):
                    name = metric if suffix == "none" else f"{metric}, {suffix}"
                    scores.setdefault((task, name), {})[row["doc_id"]] = float(score)
    return scores


def compare_tasks(by_variant: Mapping[str, TaskScores], seed: int) -> list[dict[str, Any]]:
    """Return rows of `task`, `metric`, `rows`, `base`, `tuned`, `change`.

    Args:
        by_variant: Variant → scores of `run_tasks`.
        seed: Seed of the interval's draws.
    """
    rows = []
    for (task, metric), base in by_variant["base"].items():
        numbers = sorted(base.keys() & by_variant["tuned"][task, metric].keys())
        values = {v: [by_variant[v][task, metric][n] for n in numbers] for v in VARIANTS}
        means = {v: sum(scores) / len(scores) for v, scores in values.items()}
        change = paired_change(values["base"], values["tuned"], seed=seed)
        row = {"task": task, "metric": metric, "rows": len(numbers), **means, "change": change}
        rows.append(row)
    return rows
