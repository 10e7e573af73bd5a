"""Stage `evaluate`: base against tuned on the rows that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from strixft import views
from strixft.data import collate
from strixft.errors import DataError
from strixft.evaluate.generate import generate
from strixft.evaluate.judge import judge_answers
from strixft.evaluate.judged import Judged
from strixft.evaluate.metrics import METRICS, scores, suiting
from strixft.evaluate.paired import paired_change
from strixft.guard import device_type, find_host
from strixft.methods import METHODS
from strixft.model import cache_folder, load_adapter, load_base, load_tokenizer, native_dtype
from strixft.plan import Plan
from strixft.prepare import Prepared
from strixft.progress import progress_bar
from strixft.recipe import Recipe
from strixft.runs import Result, Run, digest
from strixft.step import batch_loss
from strixft.train import ADAPTER, Trained
from strixft.units import format_number

SIDES = ("base", "tuned")
SHOWN_ANSWERS = 8
SHOWN_WORST = 5
LARGEST_LOSS = 700.0
"""Above it, a perplexity is larger than any float."""
ANSWER_ROOM = 8
"""Tokens an answer may have beyond the longest reference."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Result):
    """Measures of base and tuned on the same held-out rows."""

    name: ClassVar[str] = "evaluate"

    def _repr_html_(self) -> str:
        figures = self.figures
        rows = [
            [name, *(format_number(values[side]) for side in SIDES), _told(figures, name)]
            for name, values in figures["metrics"].items()
        ]
        answers = [
            [row["row"], row["request"], row["reference"], row["base"], row["tuned"]]
            for row in figures["answers"][:SHOWN_ANSWERS]
        ]
        header = ["row", "request", "reference", "base", "tuned"]
        return (
            views.table(rows, ["measure", *SIDES, "change, 95 % interval"])
            + views.table(answers, header)
            + self._worst_html()
        )

    @property
    def judged(self) -> Judged | None:
        """What the judge says; None where the recipe has none."""
        found = self.figures.get("judge")
        return Judged(found, self.figures["answers"]) if found else None

    def _worst_html(self) -> str:
        worst = self.figures.get("worst", [])
        if not worst:
            return ""
        rows = [
            [row["row"], row["request"], row["reference"], *(f"{row[s]:.3f}" for s in SIDES)]
            for row in worst
        ]
        text = f"{self.figures['rows_worse']} of {self.figures['rows_loss']} rows got a higher loss"
        return views.note(f"{text}; the worst:") + views.table(
            rows, ["row", "request", "reference", "base", "tuned"]
        )


@dataclass(frozen=True, slots=True)
class _Side:
    """What was measured of base or tuned."""

    losses: list[float]
    answers: list[str]
    speed: dict[str, Any]


def _told(figures: dict[str, Any], name: str) -> str:
    change = figures.get("changes", {}).get(name)
    if change is None:
        return ""
    unclear = "" if change["clear"] else ", may be chance"
    return f"{change['change']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f}){unclear}"


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Loss per trained token of each held-out row.

    Args:
        model: Base or tuned.
        rows: Token rows.
    """
    device = next(model.parameters()).device
    losses = []
    for row in progress_bar(rows, unit="row", desc="loss"):
        tensors = {name: tensor.to(device) for name, tensor in collate([row]).items()}
        losses.append(float(batch_loss(model, tensors, 1)) / len(tensors["labels"]))
    return losses


def answer_rows(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], dict[str, Any]]:
    """Greedy answers to the requests of rows, and how fast they were written."""
    room = max(len(row["input_ids"]) - row["prompt_tokens"] for row in rows) + ANSWER_ROOM
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    began = time.monotonic()
    tokens = generate(model, tokenizer, prompts, room)
    seconds = time.monotonic() - began
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    count = sum(map(len, tokens))
    rate = round(count / seconds, 1)
    return [text.strip() for text in texts], {"answer_tokens": count, "answer_tok_per_s": rate}


def load_side(recipe: Recipe, adapter: Path, side: str) -> nn.Module:
    """Base or tuned, in evaluation mode.

    Args:
        recipe: Of the run.
        adapter: The trained weights.
        side: One of `SIDES`.
    """
    *_, (_, model) = load_sides(recipe, adapter, SIDES[: SIDES.index(side) + 1])
    return model


def load_sides(
    recipe: Recipe, folder: Path, sides: Sequence[str] = SIDES
) -> Iterator[tuple[str, nn.Module]]:
    """Base, then tuned; one of them in memory at a time where all weights were trained."""
    device = device_type()
    dtype = native_dtype(device, bfloat16=find_host(recipe.memory.host).bfloat16)
    model = load_base(recipe, device, dtype)
    yield "base", model.eval()
    if "tuned" not in sides:
        return
    if METHODS[recipe.method].adapter == "none":
        del model
        model = load_base(recipe.model_copy(update={"model": str(folder)}), device, dtype)
    else:
        model = load_adapter(model, folder)
    yield "tuned", model.eval()


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    counts = weights or [1.0] * len(values)
    return sum(v * w for v, w in zip(values, counts, strict=True)) / sum(counts)


def _metrics(
    recipe: Recipe, found: Mapping[str, _Side], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The measures of both sides, and the change from base to tuned with its interval."""
    shown = rows[: recipe.evaluate.max_rows]
    references = [row["answer"] for row in shown]
    asked, tokens = recipe.evaluate.metrics, [float(sum(row["trained"])) for row in rows]
    names = suiting(references) if asked == "auto" else [n for n in asked if n in METRICS]
    values = {
        name: {
            s: scores(name, found[s].answers, references, recipe.evaluate.pattern) for s in SIDES
        }
        for name in names
    }
    metrics = {name: {s: _mean(sides[s]) for s in SIDES} for name, sides in values.items()}
    changes = {
        name: paired_change(sides["base"], sides["tuned"], seed=recipe.train.seed)
        for name, sides in values.items()
    }
    losses = {side: _mean(found[side].losses, tokens) for side in SIDES}
    perplexity = {side: math.exp(min(loss, LARGEST_LOSS)) for side, loss in losses.items()}
    base, tuned = (found[side].losses for side in SIDES)
    changes["loss"] = paired_change(base, tuned, tokens, recipe.train.seed)
    return {"loss": losses, "perplexity": perplexity, **metrics}, changes


def _worst(found: Mapping[str, _Side], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows whose loss rose most, with their text."""
    pairs = zip(found["base"].losses, found["tuned"].losses, strict=True)
    rises = sorted(((tuned - base, i) for i, (base, tuned) in enumerate(pairs)), reverse=True)
    worse = [(rise, index) for rise, index in rises if rise > 0]
    listed = [
        {
            "row": rows[index]["row"],
            "request": rows[index]["request"],
            "reference": rows[index]["answer"],
            **{side: found[side].losses[index] for side in SIDES},
        }
        for _, index in worse[:SHOWN_WORST]
    ]
    return {"rows_worse": len(worse), "worst": listed}


def _measured(recipe: Recipe, adapter: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, _Side]:
    tokenizer, found = load_tokenizer(recipe), {}
    for side, model in load_sides(recipe, adapter):
        began = time.monotonic()
        losses = row_losses(model, rows)
        answers, speed = answer_rows(model, tokenizer, rows[: recipe.evaluate.max_rows])
        speed["seconds"] = round(time.monotonic() - began, 3)
        found[side] = _Side(losses, answers, speed)
    return found


def _evaluate(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, trained = run.require(Prepared), run.require(Trained)
    run.require(Plan)
    rows = list(prepared.token_rows(run.recipe.dataset).validation)
    if not rows:
        raise DataError(
            "no rows are held out, so there is nothing to evaluate on",
            fix="--set dataset.validation_fraction=0.05 --run-dir …",
        )
    found = _measured(run.recipe, trained.folder / ADAPTER, rows)
    metrics, changes = _metrics(run.recipe, found, rows)
    shown = rows[: run.recipe.evaluate.max_rows]
    listed = [
        {
            "row": row["row"],
            "request": row["request"],
            "reference": row["answer"],
            **{side: found[side].answers[index] for side in SIDES},
        }
        for index, row in enumerate(shown)
    ]
    figures = {
        "metrics": metrics,
        "changes": changes,
        "rows_loss": len(rows),
        "rows_answered": len(shown),
        "speed": {side: found[side].speed for side in SIDES},
        **_worst(found, rows),
        "answers": listed,
    }
    if run.recipe.evaluate.judge is not None:
        torch.cuda.empty_cache()  # a judge on the same device needs the room
        figures["judge"] = judge_answers(run.recipe, listed, cache_folder())
    return {"adapter_sha256": _adapter_digest(trained.folder / ADAPTER)}, figures


def _adapter_digest(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))}


def evaluate_recipe(run: Run) -> Evaluated:
    """Measure base and tuned on the held-out rows.

    Raises:
        StageError: An earlier stage has not run.
        DataError: No rows are held out.
    """
    return run.once(Evaluated, lambda folder: _evaluate(run, folder))
