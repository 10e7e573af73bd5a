"""Held-out loss while training: how often, and of how many rows, so that it costs little time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from strixft.data.batches import RowShape
from strixft.data.general import general_rows
from strixft.data.held_out import MicroBatch, micro_batches
from strixft.model.source import load_tokenizer
from strixft.plan.dry_run import DryRun
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError

if TYPE_CHECKING:
    from strixft.prepare.stage import Prepared

SHARE = 0.02
"""Most of the training's time that evaluations should take."""

AIMED_AT, MOST = 20, 50
"""Evaluations of a run: aimed at, and where all held-out rows are few. With less than half of the
first, general texts are left to the stage `evaluate`."""

LEAST_ROWS = 16
"""Rows of an evaluation, where so many are held out: the mean loss of fewer says little."""

WRITTEN_BYTES_PER_S = 1e9
"""Rate at which the best weights are written: less than an NVMe disk does."""

FORWARD_SHARE = 0.5
"""A forward pass's share of a micro-batch where no time is predicted: backward takes no less."""

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Costs:
    """Times in updates: of a micro-batch's forward pass, and of writing the best weights."""

    forward: float
    write: float

    @classmethod
    def of(cls, run: DryRun) -> _Costs:
        update = run.seconds_per_update
        if not update or run.forward_seconds is None:
            return cls(FORWARD_SHARE / run.steps, 0.0)
        written = run.parts["adapter"] / WRITTEN_BYTES_PER_S
        return cls(run.forward_seconds / update, written / update)

    def evaluation(self, count: int) -> float:
        """Return the cost of an evaluation of so many micro-batches."""
        return count * self.forward + self.write

    def affordable(self, updates: float) -> int:
        """Return the micro-batches of an evaluation that may cost so many updates."""
        return int(max(0.0, updates - self.write) / self.forward)


def held_out_figures(
    recipe: Recipe, run: DryRun, updates: int | None, prepared: Prepared | None
) -> Figures | None:
    """Return when training evaluates, on what, and its cost; None before the data are prepared.

    `every` is 0 where it does not, with the `reason`.

    Raises:
        RecipeError: The recipe needs held-out losses, and there are none.
    """
    if prepared is None or updates is None:
        return None
    train = recipe.train
    rows = prepared.token_rows(recipe.dataset).validation
    chosen = micro_batches(rows["length"], rows["num_trained"], run.shape)
    general = general_batches(general_rows(load_tokenizer(recipe)), run.shape)
    needed = train.early_stop > 0 or train.keep == "best"
    if train.held_out_every == 0 or not chosen:
        return _off(needed, "train.held_out_every is 0" if chosen else _no_rows(len(rows)))
    costs = _Costs.of(run)
    sizes = np.cumsum([sum(map(len, batch)) for batch in chosen])
    least = int(np.searchsorted(sizes, min(LEAST_ROWS, sizes[-1]))) + 1
    both = partial(_choose, train.held_out_every, costs, updates, (least, len(chosen)))
    every, count = both(len(general))
    if not every or updates / every < AIMED_AT / 2:  # general texts would halve their number
        general, (every, count) = [], both(0)
    if every == 0 and not needed:
        share = f"{SHARE:.0%} of the time of {updates} updates"
        return _off(needed, f"two evaluations would take more than {share}")
    every = every or -(-updates // 2)
    evaluations = 1 + updates // every + (updates % every > 0)
    cost = evaluations * costs.evaluation(count + len(general))
    return {
        "every": every,
        "micro_batches": count,
        "rows": int(sizes[count - 1]),
        "of": len(rows),
        "general_texts": _documents(general),
        "evaluations": evaluations,
        "fraction": cost / (updates + cost),
        "seconds": cost * run.seconds_per_update if run.seconds_per_update else None,
        "reason": None,
    }


def general_batches(rows: Sequence[Mapping[str, Any]], shape: RowShape) -> list[MicroBatch]:
    """Return general texts, as token rows, in at most one micro-batch."""
    sizes = ([len(row["input_ids"]) for row in rows], [sum(row["trained"]) for row in rows])
    return micro_batches(*sizes, shape)[:1]


def _documents(chosen: Sequence[MicroBatch]) -> int:
    return sum(len(row) for batch in chosen for row in batch)


def _no_rows(count: int) -> str:
    if count:
        return "no held-out row is as short as those of training"
    return "no rows are held out"


def _off(needed: bool, reason: str) -> Figures:
    if needed:
        raise RecipeError(
            f"train.early_stop and train.keep: best need the held-out loss, and {reason}",
            fix="--set train.early_stop=0 --set train.keep=last, or hold rows out:"
            " --set dataset.validation_fraction=0.05",
            settings={"train.early_stop": 0, "train.keep": "last"},
        )
    return {"every": 0, "reason": reason}


def _choose(
    asked: int | str, costs: _Costs, updates: int, counts: tuple[int, int], general: int
) -> tuple[int, int]:
    """Return the updates between two evaluations, 0 for none, and the micro-batches of one.

    Args:
        asked: The recipe's number of updates, or `auto`.
        costs: In updates.
        updates: Of the run.
        counts: Micro-batches with as few rows as say something, and with all.
        general: Micro-batches of general texts, which come on top.
    """
    least, most = counts
    if isinstance(asked, int):
        return asked, max(least, min(most, costs.affordable(SHARE * asked) - general))
    whole = SHARE * updates / (1 + SHARE)
    count = min(most, costs.affordable(whole / (AIMED_AT + 1)) - general)
    if count < least:  # fewer evaluations, if at least two
        number = int(whole / costs.evaluation(least + general)) - 1  # one comes before update 1
        return (-(-updates // number) if number >= 2 else 0), least
    number = min(MOST, updates, int(whole / costs.evaluation(count + general)) - 1)
    return -(-updates // number), count
