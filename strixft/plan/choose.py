"""Choose rows, recomputed layers and accumulation for a recipe on a host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.data import largest_batch, training_order
from strixft.hardware import Budget, Host
from strixft.plan.dry_run import DryRun, RowShape, dry_run
from strixft.prepare import Prepared
from strixft.recipe import Recipe

MAX_TOKENS_PER_UPDATE = 65_536
UPDATES_AIMED_AT = 200


@dataclass(frozen=True, slots=True)
class DataShape:
    """What the plan needs to know of the data: tokens and trained tokens of each training row."""

    max_length: int
    """Longest row that the recipe allows."""
    lengths: Sequence[int] = ()
    """Empty as long as the data are not prepared: every row is taken as `max_length` long."""
    trained: Sequence[int] = ()

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared | None) -> DataShape:
        """Of prepared data, or the worst that `max_length` allows."""
        if prepared is None:
            return cls(recipe.dataset.max_length)
        rows = prepared.token_rows(recipe.dataset).train
        return cls(recipe.dataset.max_length, list(rows["num_tokens"]), list(rows["num_trained"]))

    def tokens_per_update(self, recipe: Recipe) -> int:
        """Trained tokens of one update: the recipe's, or what makes about 200 updates."""
        asked = recipe.train.tokens_per_update
        if isinstance(asked, int):
            return asked
        if not self.lengths:
            return MAX_TOKENS_PER_UPDATE
        aim = round(sum(self.trained) * recipe.train.epochs / UPDATES_AIMED_AT)
        return min(max(aim, 1), MAX_TOKENS_PER_UPDATE)

    def rows_per_update(self, recipe: Recipe) -> int:
        """Rows of one update: as many as bring its trained tokens, and never none."""
        tokens = self.tokens_per_update(recipe)
        if not self.lengths:
            return max(1, tokens // self.max_length)
        mean = sum(self.trained) / len(self.trained)
        return max(1, min(len(self.trained), round(tokens / mean)))

    def largest(self, recipe: Recipe, rows: int) -> RowShape:
        """The largest micro-batch of so many rows that the run will meet."""
        if not self.lengths:
            return RowShape(rows, self.max_length, rows * (self.max_length - 1))
        num_rows = max(rows, round(len(self.lengths) * recipe.train.epochs))
        order = training_order(self.lengths, num_rows, recipe.train.seed)
        return RowShape(rows, *largest_batch(self.lengths, self.trained, order, rows))


def _recomputed(recipe: Recipe, num_layers: int) -> list[int]:
    asked = recipe.train.recompute
    named: dict[int | str, list[int]] = {
        "auto": [0, num_layers],
        "none": [0],
        "all": [num_layers],
    }
    return named[asked] if asked in named else [min(int(asked), num_layers)]


def _rows(recipe: Recipe, data: DataShape) -> list[int]:
    asked = recipe.train.micro_batch
    if isinstance(asked, int):
        return [asked]
    most = data.rows_per_update(recipe)
    return [2**n for n in range(most.bit_length() - 1, -1, -1)]


def _candidates(recipe: Recipe, config: Any, host: Host, data: DataShape) -> Iterator[DryRun]:
    layers = _recomputed(recipe, config.get_text_config().num_hidden_layers)
    for recomputed in layers:  # recomputing costs a third more time than fewer rows do
        for rows in _rows(recipe, data):
            yield dry_run(recipe, config, host, data.largest(recipe, rows), recomputed)


def choose(recipe: Recipe, config: Any, host: Host, limit: Budget, data: DataShape) -> DryRun:
    """The first plan that fits, most rows and least recomputation first; else the smallest."""
    tried = []
    for candidate in _candidates(recipe, config, host, data):
        if candidate.peak_bytes <= limit.num_bytes:
            return candidate
        tried.append(candidate)
    return min(tried, key=lambda candidate: candidate.peak_bytes)
