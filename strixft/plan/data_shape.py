"""Lengths of the rows that a plan is made for, and how much of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from strixft.data.batches import (
    PackedRows,
    PackedShape,
    largest_batch,
    rows_of_epochs,
    training_order,
)
from strixft.plan.trace import RowShape
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe

MAX_TOKENS_PER_UPDATE = 65_536

UPDATES_AIMED_AT = 200


@dataclass(frozen=True, slots=True)
class DataShape:
    """Tokens and trained tokens of each training row; of each packed row, where rows are packed."""

    max_length: int
    """Longest row that the recipe allows; packed rows are filled up to it."""
    lengths: Sequence[int] = ()
    """Empty as long as the data are not prepared: every row is taken as `max_length` long."""
    trained: Sequence[int] = ()
    documents: Sequence[int] = ()
    """Documents of each packed row, its padding counted as one; empty where rows are not packed."""
    longest: int = 0
    """Tokens of the longest document or padding of a packed row."""

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared | None, *, packed: bool) -> DataShape:
        """Return the shape of prepared data, or the worst that `max_length` allows.

        Args:
            recipe: The recipe, with the longest row that it allows.
            prepared: The data.
            packed: Several documents share a row.
        """
        most = recipe.dataset.max_length
        if prepared is None:
            return cls(most, longest=most if packed else 0)
        if packed:
            return cls.of_packed(most, prepared.packed_rows(recipe.dataset))
        rows = prepared.token_rows(recipe.dataset).train
        return cls(most, list(rows["length"]), list(rows["num_trained"]))

    @classmethod
    def of_packed(cls, most: int, rows: PackedRows) -> DataShape:
        """Return the shape of packed rows that are filled up to `most` tokens."""
        lengths, trained, documents = rows.sums("length"), rows.sums("num_trained"), rows.counts()
        rooms = most - lengths
        longest = max(int(rooms.max()), rows.longest())
        whole = documents + (rooms > 0)
        return cls(most, lengths.tolist(), trained.tolist(), whole.tolist(), longest)

    @property
    def is_packed(self) -> bool:
        """Several documents share a row."""
        return self.longest > 0

    def tokens_per_update(self, recipe: Recipe) -> int:
        """Return trained tokens of one update: the recipe's, or what makes about 200 updates."""
        asked = recipe.train.tokens_per_update
        if isinstance(asked, int):
            return asked
        if not self.lengths:
            return MAX_TOKENS_PER_UPDATE
        aim = round(sum(self.trained) * recipe.train.epochs / UPDATES_AIMED_AT)
        return min(max(aim, 1), MAX_TOKENS_PER_UPDATE)

    def rows_per_update(self, recipe: Recipe) -> int:
        """Return the rows of one update: as many as bring its trained tokens, at least one."""
        tokens = self.tokens_per_update(recipe)
        if not self.lengths:
            return max(1, tokens // self.max_length)
        mean = sum(self.trained) / len(self.trained)
        return max(1, min(len(self.trained), round(tokens / mean)))

    def steps(self, recipe: Recipe, rows: int) -> int:
        """Return the micro-batches of so many rows in an update."""
        return max(1, round(self.rows_per_update(recipe) / rows))

    def num_rows(self, recipe: Recipe) -> int:
        """Return the rows that the run trains in all its epochs."""
        return rows_of_epochs(len(self.lengths), recipe.train.epochs)

    def updates(self, recipe: Recipe, rows: int) -> int | None:
        """Return the updates of a run in micro-batches of so many rows; the last may be smaller.

        None before the data are prepared.
        """
        if not self.lengths:
            return None
        return -(-self.num_rows(recipe) // (rows * self.steps(recipe, rows)))

    def mean_length(self) -> float:
        """Return the real tokens of a row, on average."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else self.max_length

    def _packed_shape(self, order: Sequence[int], rows: int) -> PackedShape | None:
        if not self.is_packed:
            return None
        shape = PackedShape(self.max_length, 0, self.longest, rows)
        counts = np.array(self.documents or [1])[list(order)]
        documents = np.add.reduceat(counts, range(0, len(counts), rows))
        documents[-1] += (-len(counts) % rows) * len(shape.empty_row())
        return replace(shape, documents=int(documents.max()))

    def largest(self, recipe: Recipe, rows: int) -> RowShape:
        """Return the largest micro-batch of so many rows that the run will meet."""
        if not self.lengths:
            packed = self._packed_shape([0] * rows, rows)
            return RowShape(rows, self.max_length, rows * (self.max_length - 1), packed)
        sizes, seed = self.trained if self.is_packed else self.lengths, recipe.train.seed
        padded = not self.is_packed
        order = training_order(sizes, self.num_rows(recipe), seed, rows, padded=padded)
        length, trained = largest_batch(self.lengths, self.trained, order, rows)
        packed = self._packed_shape(order, rows)
        return RowShape(rows, self.max_length if packed else length, trained, packed)
