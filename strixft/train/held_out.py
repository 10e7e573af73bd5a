"""Losses on held-out rows and general texts between updates: the best weights, and an early stop.

Neither the weights nor a generator changes, so the updates are what they would be without them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset as Rows
from torch import nn

from strixft.data.batches import Batch, PackedShape, RowShape
from strixft.data.general import general_rows
from strixft.data.held_out import FixedBatches, micro_batches
from strixft.model.source import load_tokenizer
from strixft.plan.held_out import general_batches
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe
from strixft.step.update import TrainingStep
from strixft.support.files import whole_folder, write_json

BEST, LOSSES = "best", "held_out.json"
"""Folder of the weights with the lowest held-out loss, as `save_pretrained` has it; their losses in
it."""

Evaluation = dict[str, Any]
"""`update`, 0 before the first; `held_out_loss` and `general_loss`, per trained token in nats, None
where it was not taken or is not finite."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Evaluations of a training."""

    every: int
    """Updates between two."""
    rows: Iterable[Batch]
    general: Iterable[Batch]
    early_stop: int = 0
    """Evaluations without a new lowest loss that end the training; 0 for none."""

    @classmethod
    def planned(
        cls, recipe: Recipe, prepared: Prepared, planned: Mapping[str, Any], device: str
    ) -> HeldOut | None:
        """Return the evaluations of a plan; None where it has none.

        Args:
            recipe: The recipe.
            prepared: Its data.
            planned: Figures of the plan; one of an older version has none.
            device: Of the training.
        """
        found, choice = planned.get("held_out"), planned["choice"]
        if not found or not found["every"]:
            return None
        packed = PackedShape(**choice["packed"]) if choice["packed"] else None
        size, length = choice["micro_batch_rows"], choice["max_length"]
        shape = RowShape(size, length, choice["trained_tokens"], packed)
        rows = prepared.token_rows(recipe.dataset).validation
        chosen = micro_batches(rows["length"], rows["num_trained"], shape)
        texts = general_rows(load_tokenizer(recipe))
        first = general_batches(texts, shape) if found["general_texts"] else []
        return cls(
            found["every"],
            FixedBatches(rows, chosen[: found["micro_batches"]], shape, device),
            FixedBatches(Rows.from_list(texts), first, shape, device),
            recipe.train.early_stop,
        )

    def is_due(self, update: int, updates: int, done: Sequence[Evaluation]) -> bool:
        """Return whether the losses after an update are to be taken, and were not yet."""
        if done and done[-1]["update"] == update:
            return False
        return update % self.every == 0 or update == updates

    def evaluate(
        self, step: TrainingStep, update: int, after_batch: Callable[[], None]
    ) -> Evaluation:
        """Return the losses after an update.

        Args:
            step: With the weights of then.
            update: Its number.
            after_batch: Called after each micro-batch; an error drops the evaluation.
        """
        return {
            "update": update,
            "held_out_loss": _mean_loss(step, self.rows, after_batch),
            "general_loss": _mean_loss(step, self.general, after_batch),
        }

    def stop_reason(self, done: Sequence[Evaluation]) -> str | None:
        """Return why the training should end early; None where it should not."""
        if not self.early_stop or (lowest := best(done)) is None:
            return None
        since = sum(one["update"] > lowest["update"] for one in done)
        if since < self.early_stop:
            return None
        return (
            f"the held-out loss was lowest after update {lowest['update']}"
            f" ({lowest['held_out_loss']:.4f}), and {since} evaluations since brought no lower one"
        )


def best(done: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation with the lowest held-out loss; that before the first update is none."""
    after = [one for one in done if one["update"] and one["held_out_loss"] is not None]
    return min(after, key=lambda one: one["held_out_loss"], default=None)


def keep_best(model: nn.Module, folder: Path, done: Sequence[Evaluation]) -> None:
    """Write the weights to `best`, with their losses, if the newest evaluation is the best."""
    if best(done) is done[-1]:
        with whole_folder(folder / BEST) as path:
            _save(model, path)
            write_json(path / LOSSES, done[-1])


def keep_result(keep: str, model: nn.Module, folder: Path, name: str) -> Evaluation | None:
    """Write the weights that later stages use; return the losses of the best, if they are those.

    Args:
        keep: `last` or `best`.
        model: With the last weights.
        folder: Of the stage.
        name: Of their folder in it.
    """
    losses, found = folder / BEST / LOSSES, None
    with whole_folder(folder / name) as path:
        if keep == "best" and losses.is_file():
            shutil.copytree(folder / BEST, path, dirs_exist_ok=True)
            found = json.loads(losses.read_text(encoding="utf-8"))
        else:
            _save(model, path)
    return found


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _mean_loss(
    step: TrainingStep, batches: Iterable[Batch], after_batch: Callable[[], None]
) -> float | None:
    """Return the mean loss of a trained token; None without one, or where it is not finite."""
    total, count = 0.0, 0
    for batch in batches:
        total += float(step.held_out_loss(batch))
        count += len(batch["labels"])
        after_batch()
    mean = total / count if count else math.nan
    return mean if math.isfinite(mean) else None
