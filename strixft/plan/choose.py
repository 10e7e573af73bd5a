"""Choose rows, recomputed layers and accumulation for a recipe on a host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from strixft.hardware import Budget, Host
from strixft.plan.dry_run import DryRun, RowShape, dry_run
from strixft.prepare import Prepared
from strixft.recipe import Recipe

MAX_TOKENS_PER_UPDATE = 65_536
UPDATES_AIMED_AT = 200


@dataclass(frozen=True, slots=True)
class DataShape:
    """What the plan needs to know of the data."""

    longest: int
    """Tokens of the longest row."""
    most_trained: int
    """Trained tokens of the row that has most of them."""
    rows: int | None = None
    """Training rows; None as long as the data are not prepared."""
    trained_tokens: int | None = None
    """Trained tokens of one epoch; None as long as the data are not prepared."""

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared | None) -> DataShape:
        """Of prepared data, or the worst that `max_length` allows."""
        if prepared is None:
            return cls(recipe.dataset.max_length, recipe.dataset.max_length - 1)
        figures = prepared.figures
        return cls(
            figures["longest_tokens"],
            figures["most_trained_tokens"],
            figures["rows_train"],
            figures["trained_tokens"],
        )

    def tokens_per_update(self, recipe: Recipe) -> int:
        """Trained tokens of one update: the recipe's, or what makes about 200 updates."""
        asked = recipe.train.tokens_per_update
        if isinstance(asked, int):
            return asked
        if self.trained_tokens is None:
            return MAX_TOKENS_PER_UPDATE
        aim = round(self.trained_tokens * recipe.train.epochs / UPDATES_AIMED_AT)
        return min(max(aim, 1), MAX_TOKENS_PER_UPDATE)

    def rows_per_update(self, recipe: Recipe) -> int:
        """Rows of one update: as many as bring its trained tokens, and never none."""
        tokens = self.tokens_per_update(recipe)
        if self.rows is None or self.trained_tokens is None:
            return max(1, tokens // self.longest)
        mean = self.trained_tokens / self.rows
        return max(1, min(self.rows, round(tokens / mean)))


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
            shape = RowShape(rows, data.longest, data.most_trained)
            yield dry_run(recipe, config, host, shape, recomputed)


def choose(recipe: Recipe, config: Any, host: Host, limit: Budget, data: DataShape) -> DryRun:
    """The first plan that fits, most rows and least recomputation first; else the smallest."""
    tried = []
    for candidate in _candidates(recipe, config, host, data):
        if candidate.peak_bytes <= limit.num_bytes:
            return candidate
        tried.append(candidate)
    return min(tried, key=lambda candidate: candidate.peak_bytes)
