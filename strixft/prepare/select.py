"""Select rows on disk: leave out what repeats, split, look for leaks, and pack.

All of it works on the row file's columns of numbers; texts and tokens stay on disk. N is the number
of rows in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.batches import pack
from strixft.data.duplicates import Split, first_of_each, leaks, near_duplicates, split_rows
from strixft.data.encode import read_counts
from strixft.data.load import Input
from strixft.data.row_report import KEPT, LEFT_OUT, Problem, RowReport
from strixft.recipe.schema import Recipe

BINS = 40
"""Bins of the histogram of lengths."""


KEEPING, ROUND = 0.98, 128
"""Share of rows that a length should keep, and the tokens that it is a multiple of."""


def keeping_length(lengths: npt.NDArray[Any]) -> int:
    """Return the `max_length` that keeps 98 % of rows of these lengths.

    >>> keeping_length(np.array([10] * 97 + [300, 700, 900]))
    384
    """
    if not len(lengths):
        return ROUND
    length = np.quantile(lengths, KEEPING, method="inverted_cdf")
    return int(-(-length // ROUND) * ROUND)


class Selection:
    """The rows on disk that are used, and how."""

    def __init__(
        self, recipe: Recipe, inputs: Sequence[Input], report: RowReport, path: Path
    ) -> None:
        self._dataset, self._inputs, self._report = recipe.dataset, inputs, report
        self.columns = columns = read_counts(path)
        """Numbers of each row, each column (N,)."""
        self._kept = np.ones(len(columns["row"]), dtype=np.bool_)  # (N,)
        first, drop = first_of_each(columns["content"]), recipe.dataset.duplicates == "drop"
        self.rows_duplicate = self._leave_out(first, "duplicate", "says the same as", drop=drop)
        self.rows_near = 0
        if report.sketches:
            near, chat = near_duplicates(report.sketches), columns["chat"]  # in ascending order
            first = np.searchsorted(chat, np.arange(len(near)))[near[chat]]
            drop = recipe.dataset.near_duplicates == "drop"
            told = "says nearly the same as"
            self.rows_near = self._leave_out(first, "near_duplicate", told, drop=drop)
        self.split = self._split()
        self.lengths: npt.NDArray[Any] = columns["length"][self.split.train]
        """Tokens of each training row."""
        self.packing = pack(self.lengths, recipe.dataset.max_length, recipe.train.seed)
        found = leaks(columns["question"], self.split.train, self.split.validation)
        for row, other in found:
            self._note(row, "leak", "is held out, and asks what", other, " asks in training")
        self.num_leaks = len(found)

    def _note(
        self, row: int, kind: str, words: str, other: int, more: str = "", *, action: str = KEPT
    ) -> None:
        """Note a row and the one that it repeats, whose file is named where it is another one."""
        files, rows = self.columns["file"], self.columns["row"]
        name, others = (self._inputs[files[index]].name for index in (row, other))
        beside = "" if files[row] == files[other] else f"{others.rpartition('/')[2]}, "
        text = f"{words} {beside}row {rows[other]}{more}"
        self._report.note(Problem(name, int(rows[row]), kind, text, action))

    def _leave_out(self, first: npt.NDArray[np.int64], kind: str, words: str, *, drop: bool) -> int:
        """Note chats that repeat an earlier one, and leave them out where `drop` says so."""
        chat = self.columns["chat"]
        later = np.flatnonzero((chat[first] != chat) & self._kept & self._kept[first])
        _, places = np.unique(chat[later], return_index=True)  # a chat may have several rows
        for row in later[places].tolist():
            self._note(row, kind, words, int(first[row]), action=LEFT_OUT if drop else KEPT)
        self._kept[later] &= not drop
        return len(places)

    def _split(self) -> Split:
        file = self.columns["file"]
        weights = np.array([one.weight for one in self._inputs])[file]
        train_only = np.array([one.train_only for one in self._inputs])[file]
        divided = self._kept & ~train_only  # the split is the same as without the others
        fraction = self._dataset.validation_fraction
        split = split_rows(self.columns["group"], divided, weights, fraction)
        added = np.flatnonzero(self._kept & train_only)
        return Split(np.concatenate([split.train, added]), split.validation)

    def save(self, path: Path) -> None:
        """Write the indices to a file."""
        np.savez(
            path,
            train=self.split.train,
            validation=self.split.validation,
            packed_rows=self.packing.rows,
            packed_starts=self.packing.starts,
            max_length=self.packing.max_length,
        )

    def figures(self) -> dict[str, Any]:
        """Return the numbers for the stage's result."""
        lengths, trained = self.lengths, self.columns["num_trained"][self.split.train]
        max_length, tokens = self._dataset.max_length, int(lengths.sum(dtype=np.int64))
        # the histogram goes a little beyond the cut; its last bin has the rows that are longer
        long = np.frombuffer(self._report.long_lengths, dtype=np.int64)
        longest = int(max(lengths.max(initial=1), long.max(initial=1)))
        edges = np.linspace(0, min(longest, 4 * max_length), BINS + 1)
        bins = [np.histogram(np.minimum(of, edges[-1]), edges)[0] for of in (lengths, long)]
        return {
            "rows_train": len(lengths),
            "rows_validation": len(self.split.validation),
            "rows_duplicate": self.rows_duplicate,
            "rows_near_duplicate": self.rows_near,
            "leaks": self.num_leaks,
            "tokens": tokens,
            "trained_tokens": int(trained.sum(dtype=np.int64)),
            "longest_tokens": int(lengths.max(initial=0)),
            "keeping_length": keeping_length(np.concatenate([self.columns["length"], long])),
            "most_trained_tokens": int(trained.max(initial=0)),
            "lengths": {
                "edges": [round(float(edge), 1) for edge in edges],
                "rows": bins[0].tolist(),
                "too_long": bins[1].tolist(),
            },
            "packing": {
                "rows": len(self.packing),
                "max_length": max_length,
                "fill": round(self.packing.fill(lengths), 4),
                "fill_without": round(tokens / max(1, len(lengths) * max_length), 4),
                "asked": self._dataset.packing,
            },
        }
