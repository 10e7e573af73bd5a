"""Tasks of lm-eval (EleutherAI's evaluation harness) on base and tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strixft.data.load import hub_offline
from strixft.evaluate.metrics import paired_change
from strixft.evaluate.variants import VARIANTS
from strixft.model.adapter import base_of
from strixft.model.config import first_lines
from strixft.recipe.schema import Recipe
from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import did_you_mean

LONGEST = 4096
"""Tokens of a prompt; longer ones lose their beginning."""

LOGIT_BYTES = 8
"""Bytes of one logit: lm-eval keeps those of a whole batch in float32, and their log-softmax."""

TaskScores = dict[tuple[str, str], dict[int, float]]
"""Task and metric → number of the row → its score."""


def check_tasks(recipe: Recipe) -> Any:
    """Return a manager of the recipe's tasks; None if it names none. Nothing is downloaded.

    Raises:
        HostError: lm-eval is not installed.
        RecipeError: There is no such task.
    """
    asked = recipe.evaluate
    if not asked.tasks:
        return None
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HostError(
            "evaluate.tasks needs lm-eval, which is not installed",
            fix="pip install 'strixft[eval]'",
        ) from error
    folder = asked.task_folder
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(asked.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # all tasks, which takes seconds
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
            with hub_offline(recipe.offline):
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
    """Return the rows of a batch whose logits fit beside the weights into the plan's budget."""
    left = plan["host"]["budget_bytes"] - plan["phases"]["evaluate"]["device_bytes"]
    fit: int = left // (LOGIT_BYTES * vocabulary * LONGEST)
    return max(1, min(int(plan["choice"]["evaluated_rows"]), fit))


def run_tasks(
    manager: Any, recipe: Recipe, model: Any, tokenizer: Any, rows_at_once: int
) -> TaskScores:
    """Run the recipe's tasks on one model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    base = base_of(model)
    longest = min(LONGEST, getattr(base.config, "max_position_embeddings", LONGEST))
    wrapped = HFLM(
        pretrained=base, tokenizer=tokenizer, batch_size=rows_at_once, max_length=longest
    )
    with hub_offline(recipe.offline):
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
    """Return rows of `task`, `metric`, `rows`, `base`, `tuned`, `change`."""
    rows = []
    for (task, metric), base in by_variant["base"].items():
        numbers = sorted(base.keys() & by_variant["tuned"][task, metric].keys())
        values = {v: [by_variant[v][task, metric][n] for n in numbers] for v in VARIANTS}
        means = {v: sum(scores) / len(scores) for v, scores in values.items()}
        change = paired_change(values["base"], values["tuned"], seed=seed)
        about = {"task": task, "metric": metric, "rows": len(numbers)}
        rows.append({**about, **means, "change": change})
    return rows
