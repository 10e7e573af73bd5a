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

from strixft.data.duplicates import (
    Split,
    first_of_each,
    leaks,
    near_duplicates,
    split_rows,
)
from strixft.data.load import Input, Problem
from strixft.data.pack import pack
from strixft.data.row_report import KEPT, LEFT_OUT, RowReport
from strixft.data.rows import read_counts
from strixft.recipe.schema import Recipe

BINS = 40
"""Bins of the histogram of lengths."""


class Selection:
    """The rows on disk that are used, and how.

    Args:
        recipe: Its `dataset` says what to leave out.
        inputs: Sources of the rows.
        report: Gets every duplicate and leak.
        path: The row file.
        sketches: Of all chats, where near duplicates are asked for.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: Sequence[Input],
        report: RowReport,
        path: Path,
        sketches: bytes | bytearray = b"",
    ) -> None:
        self._dataset, self._inputs, self._report = recipe.dataset, inputs, report
        self.columns = read_counts(path)
        """Numbers of each row, each column (N,)."""
        self._kept = np.ones(len(self.columns["row"]), dtype=np.bool_)  # (N,)
        self.rows_duplicate = self._leave_out(
            first_of_each(self.columns["content"]),
            "duplicate",
            "says the same as",
            drop=self._dataset.duplicates == "drop",
        )
        self.rows_near = 0
        if sketches:
            near = near_duplicates(sketches)
            chat = self.columns["chat"]  # in ascending order
            first_row = np.searchsorted(chat, np.arange(len(near)))
            self.rows_near = self._leave_out(
                first_row[near[chat]],
                "near_duplicate",
                "says nearly the same as",
                drop=self._dataset.near_duplicates == "drop",
            )
        self.split = self._split()
        max_length = self._dataset.max_length
        self.packing = pack(self.lengths, max_length, recipe.train.seed)
        self.num_leaks = self._note_leaks()

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens of each training row."""
        lengths: npt.NDArray[Any] = self.columns["length"][self.split.train]
        return lengths

    def _name(self, row: int, *, beside: int) -> str:
        """Name a row for the problem of another one; without the file if both are in the same."""
        file = self.columns["file"][row]
        same = self.columns["file"][beside] == file
        name = "" if same else f"{self._inputs[file].name.rpartition('/')[2]}, "
        return f"{name}row {self.columns['row'][row]}"

    def _note(self, row: int, kind: str, text: str, action: str) -> None:
        name = self._inputs[self.columns["file"][row]].name
        self._report.note(Problem(name, int(self.columns["row"][row]), kind, text, action))

    def _leave_out(self, first: npt.NDArray[np.int64], kind: str, words: str, *, drop: bool) -> int:
        """Note chats that repeat an earlier one, and leave them out where `drop` says so.

        Args:
            first: For each row the first row that says the same, (N,).
            kind: Of the problem.
            words: Between the two rows.
            drop: Leave the later rows out.
        """
        chat = self.columns["chat"]
        later = np.flatnonzero((chat[first] != chat) & self._kept & self._kept[first])
        noted: set[int] = set()  # a chat may have several rows
        for row in later.tolist():
            if int(chat[row]) not in noted:
                noted.add(int(chat[row]))
                text = f"{words} {self._name(int(first[row]), beside=row)}"
                self._note(row, kind, text, LEFT_OUT if drop else KEPT)
        if drop:
            self._kept[later] = False
        return len(noted)

    def _split(self) -> Split:
        file = self.columns["file"]
        weights = np.array([one.weight for one in self._inputs])[file]
        train_only = np.array([one.train_only for one in self._inputs])[file]
        divided = self._kept & ~train_only  # the split is the same as without the others
        fraction = self._dataset.validation_fraction
        split = split_rows(self.columns["group"], divided, weights, fraction)
        added = np.flatnonzero(self._kept & train_only)
        return Split(np.concatenate([split.train, added]), split.validation)

    def _note_leaks(self) -> int:
        """Note and count validation rows that ask what a training row asks."""
        found = leaks(self.columns["question"], self.split.train, self.split.validation)
        for row, other in found:
            text = f"is held out, and asks what {self._name(other, beside=row)} asks in training"
            self._note(row, "leak", text, KEPT)
        return len(found)

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
        long = np.frombuffer(self._report.long_lengths, dtype=np.int64)
        return {
            "rows_train": len(lengths),
            "rows_validation": len(self.split.validation),
            "rows_duplicate": self.rows_duplicate,
            "rows_near_duplicate": self.rows_near,
            "leaks": self.num_leaks,
            "tokens": tokens,
            "trained_tokens": int(trained.sum(dtype=np.int64)),
            "longest_tokens": int(lengths.max(initial=0)),
            "most_trained_tokens": int(trained.max(initial=0)),
            "lengths": _histogram(lengths, long, max_length),
            "packing": {
                "rows": len(self.packing),
                "max_length": max_length,
                "fill": round(self.packing.fill(lengths), 4),
                "fill_without": round(tokens / max(1, len(lengths) * max_length), 4),
            },
        }


def _histogram(
    lengths: npt.NDArray[Any], long_lengths: npt.NDArray[Any], max_length: int
) -> dict[str, Any]:
    """Count rows by their tokens, up to a little beyond the cut or the longest row."""
    longest = int(max(lengths.max(initial=1), long_lengths.max(initial=1)))
    edges = np.linspace(0, min(longest, 4 * max_length), BINS + 1)
    # the last bin also has the rows that are longer still
    kept, _ = np.histogram(np.minimum(lengths, edges[-1]), edges)
    long, _ = np.histogram(np.minimum(long_lengths, edges[-1]), edges)
    return {
        "edges": [round(float(edge), 1) for edge in edges],
        "rows": kept.tolist(),
        "too_long": long.tolist(),
    }
