"""Stage `evaluate`: base against tuned on the rows that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from strixft import views
from strixft.data import collate
from strixft.errors import DataError
from strixft.guard import device_type, find_host
from strixft.methods import METHODS
from strixft.model import load_adapter, load_base, load_tokenizer, native_dtype
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
ANSWERED_AT_ONCE = 16
"""Prompts in one batch of generation."""
ANSWER_ROOM = 8
"""Tokens an answer may have beyond the longest reference."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Result):
    """Measures of base and tuned on the same held-out rows."""

    name: ClassVar[str] = "evaluate"

    def _repr_html_(self) -> str:
        rows = [
            [name, *(format_number(values[side]) for side in SIDES)]
            for name, values in self.figures["metrics"].items()
        ]
        answers = [
            [row["row"], row["request"], row["reference"], row["base"], row["tuned"]]
            for row in self.figures["answers"][:SHOWN_ANSWERS]
        ]
        header = ["row", "request", "reference", "base", "tuned"]
        return views.table(rows, ["measure", *SIDES]) + views.table(answers, header)


def _batches(rows: Any, size: int) -> Iterator[list[Mapping[str, Any]]]:
    for start in range(0, len(rows), size):
        yield [rows[index] for index in range(start, min(start + size, len(rows)))]


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Mapping[str, Any]], rows_at_once: int) -> float:
    """Loss per trained token of held-out rows, over all of them.

    Args:
        model: Base or tuned.
        rows: Token rows.
        rows_at_once: B.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in _batches(rows, rows_at_once):
        tensors = {name: tensor.to(device) for name, tensor in collate(batch).items()}
        total += float(batch_loss(model, tensors, 1))
        count += len(tensors["labels"])
    return total / count


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch whose ends meet: ids and mask, (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])  # (B, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])  # (B, T)
    return ids, mask


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to prompts, as one batch.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, up to where the answer starts.
        max_new_tokens: Longest answer.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad))
    produced = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    texts: list[str] = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _answers(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    room = max(len(row["input_ids"]) - row["prompt_tokens"] for row in rows) + ANSWER_ROOM
    order = sorted(range(len(rows)), key=lambda index: rows[index]["prompt_tokens"])
    found: dict[int, str] = {}
    for start in progress_bar(range(0, len(order), ANSWERED_AT_ONCE), unit="batch", desc="answers"):
        part = order[start : start + ANSWERED_AT_ONCE]
        prompts = [rows[i]["input_ids"][: rows[i]["prompt_tokens"]] for i in part]
        found |= dict(zip(part, answer(model, tokenizer, prompts, room), strict=True))
    return [found[index] for index in range(len(rows))]


def load_sides(recipe: Recipe, folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """Base, then tuned; one of them in memory at a time where all weights were trained."""
    device = device_type()
    dtype = native_dtype(device, bfloat16=find_host(recipe.memory.host).bfloat16)
    model = load_base(recipe, device, dtype)
    yield "base", model.eval()
    if METHODS[recipe.method].adapter == "none":
        del model
        model = load_base(recipe.model_copy(update={"model": str(folder)}), device, dtype)
    else:
        model = load_adapter(model, folder)
    yield "tuned", model.eval()


def _exact(answers: Sequence[str], references: Sequence[str]) -> float:
    pairs = zip(answers, references, strict=True)
    return sum(answer == reference.strip() for answer, reference in pairs) / len(references)


def _metrics(
    recipe: Recipe, losses: Mapping[str, float], answers: Mapping[str, Sequence[str]], rows: Any
) -> dict[str, dict[str, float]]:
    references = [row["answer"] for row in rows]
    found = {
        "loss": losses,
        "perplexity": {side: math.exp(loss) for side, loss in losses.items()},
        "exact_match": {side: _exact(texts, references) for side, texts in answers.items()},
    }
    asked = recipe.evaluate.metrics
    return {name: dict(row) for name, row in found.items() if asked == "auto" or name in asked}


def _evaluate(run: Run, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared, plan, trained = run.require(Prepared), run.require(Plan), run.require(Trained)
    held_out = prepared.token_rows(run.recipe.dataset).validation
    if not len(held_out):
        raise DataError(
            "no rows are held out, so there is nothing to evaluate on",
            fix="--set dataset.validation_fraction=0.05 --run-dir …",
        )
    rows = list(held_out)
    shown = rows[: run.recipe.evaluate.max_rows]
    tokenizer = load_tokenizer(run.recipe)
    losses, answers, seconds = {}, {}, {}
    for side, model in load_sides(run.recipe, trained.folder / ADAPTER):
        began = time.monotonic()
        losses[side] = mean_loss(model, rows, plan.figures["choice"]["micro_batch_rows"])
        answers[side] = _answers(model, tokenizer, shown)
        seconds[side] = round(time.monotonic() - began, 3)
    listed = [
        {
            "row": row["row"],
            "request": row["request"],
            "reference": row["answer"],
            **{side: answers[side][index] for side in SIDES},
        }
        for index, row in enumerate(shown)
    ]
    figures = {
        "metrics": _metrics(run.recipe, losses, answers, shown),
        "rows_loss": len(rows),
        "rows_answered": len(shown),
        "seconds": seconds,
        "answers": listed,
    }
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
