"""What is measured of one side: losses, answers, tasks, and how fast it went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from strixft.data.ends import Ends
from strixft.evaluate.generate import generate, prompt_tokens
from strixft.evaluate.harness import Values, rows_at_once, run_tasks
from strixft.evaluate.losses import row_losses
from strixft.guard.stage_watches import StageWatch
from strixft.plan.result import Plan
from strixft.recipe.schema import Recipe

ANSWER_ROOM = 8
"""Tokens an answer may have beyond the longest reference."""


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of base or tuned."""

    losses: list[float]
    general: list[float]
    answers: list[str]
    prompted: list[str]
    tasks: Values
    speed: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What both sides are measured on, and the room there is for it."""

    recipe: Recipe
    plan: Plan
    tokenizer: Any
    ends: Ends
    rows: Rows
    """Held out; they are on disk, and read as they are needed."""
    general: Rows
    metrics: list[str]
    tasks: Any
    watch: StageWatch

    @property
    def answered(self) -> Rows:
        """Held-out rows that are answered in full."""
        count = min(len(self.rows), self.recipe.evaluate.max_rows)
        return [self.rows[index] for index in range(count)]

    @property
    def most_tokens(self) -> int:
        """Of a batch: what the plan's phases `evaluate` and `generate` were run dry with."""
        choice = self.plan.figures["choice"]
        return int(choice["evaluated_rows"] * choice["max_length"])

    def losses(self, model: nn.Module, rows: Rows) -> list[float]:
        """Loss per trained token of each row."""
        return row_losses(model, rows, self.most_tokens, self.watch.look)

    def answer_tokens(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], most: int
    ) -> list[list[int]]:
        """Greedy answers to prompts, with at most so many tokens."""
        return generate(
            model, self.tokenizer, self.ends, prompts, most, self.most_tokens, look=self.watch.look
        )

    def decoded(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Answers as text."""
        return [self.ends.text(self.tokenizer, answer).strip() for answer in tokens]


def _answer_rows(work: Work, model: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """Greedy answers to the requests of held-out rows, and how fast they were written."""
    rows = work.answered
    most = max(len(row["input_ids"]) - row["prompt_tokens"] for row in rows) + ANSWER_ROOM
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    began = time.monotonic()
    tokens = work.answer_tokens(model, prompts, most)
    count, seconds = sum(map(len, tokens)), time.monotonic() - began
    speed = {"answer_tokens": count, "answer_tok_per_s": round(count / seconds, 1)}
    return work.decoded(tokens), speed


def _answer_prompts(work: Work, model: nn.Module) -> list[str]:
    asked = work.recipe.evaluate
    prompts = [prompt_tokens(work.tokenizer, text) for text in asked.prompts]
    return work.decoded(work.answer_tokens(model, prompts, asked.prompt_answer_tokens))


def _run_tasks(work: Work, model: nn.Module) -> Values:
    if work.tasks is None:
        return {}
    at_once = rows_at_once(work.plan.figures, len(work.tokenizer))
    return run_tasks(work.tasks, work.recipe, model, work.tokenizer, at_once)


def measure(work: Work, model: nn.Module) -> Side:
    """Losses, answers and tasks of base or tuned."""
    began = time.monotonic()
    losses = work.losses(model, work.rows)
    loss_seconds = time.monotonic() - began
    general = work.losses(model, work.general)
    answers, speed = _answer_rows(work, model)
    prompted = _answer_prompts(work, model)
    tasks = _run_tasks(work, model)
    speed |= {
        "loss_seconds": round(loss_seconds, 3),
        "seconds": round(time.monotonic() - began, 3),
    }
    return Side(losses, general, answers, prompted, tasks, speed)
