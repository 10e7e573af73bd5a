"""After the rows are on disk: which of them are trained, which are held out, and which go together.

Works on the columns of numbers alone; texts and tokens stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.duplicates import Sketches, Split, first_of_each, leaks, split_rows
from strixft.data.load import Input, Problem
from strixft.data.pack import Packing, pack
from strixft.data.row_report import KEPT, LEFT_OUT, RowReport
from strixft.data.rows import read_counts
from strixft.recipe.schema import Recipe

Counts = dict[str, npt.NDArray[Any]]

BINS = 40


@dataclass(frozen=True, slots=True)
class Chosen:
    """What of the rows on disk is used, and how."""

    counts: Counts
    split: Split
    packing: Packing
    rows_duplicate: int
    rows_near: int
    num_leaks: int

    def save(self, path: Path) -> None:
        """Write the indices down."""
        np.savez(
            path,
            train=self.split.train,
            validation=self.split.validation,
            packed_rows=self.packing.rows,
            packed_starts=self.packing.starts,
            max_length=self.packing.max_length,
        )

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Tokens of each training row."""
        lengths: npt.NDArray[Any] = self.counts["length"][self.split.train]
        return lengths


class _Chooser:
    def __init__(self, recipe: Recipe, inputs: Sequence[Input], account: RowReport, path: Path):
        self.dataset, self.seed = recipe.dataset, recipe.train.seed
        self.inputs, self.account = inputs, account
        self.counts = read_counts(path)
        self.kept = np.ones(len(self.counts["row"]), dtype=np.bool_)

    def _name(self, row: int, *, beside: int | None = None) -> str:
        file = self.counts["file"][row]
        same = beside is not None and self.counts["file"][beside] == file
        name = "" if same else f"{self.inputs[file].name.rpartition('/')[2]}, "
        return f"{name}row {self.counts['row'][row]}"

    def _note(self, row: int, kind: str, text: str, action: str) -> None:
        name = self.inputs[self.counts["file"][row]].name
        self.account.note(Problem(name, int(self.counts["row"][row]), kind, text, action))

    def _repeats(self, first: npt.NDArray[np.int64], kind: str, words: str, *, drop: bool) -> int:
        """Note rows of which an earlier chat says the same; leave them out if that is asked."""
        chat = self.counts["chat"]
        later = np.flatnonzero((chat[first] != chat) & self.kept & self.kept[first])
        noted: set[int] = set()
        for row in later.tolist():
            if int(chat[row]) not in noted:
                noted.add(int(chat[row]))
                text = f"{words} {self._name(int(first[row]), beside=row)}"
                self._note(row, kind, text, LEFT_OUT if drop else KEPT)
        if drop:
            self.kept[later] = False
        return len(noted)

    def duplicates(self) -> int:
        """Rows that say exactly what an earlier one says."""
        drop = self.dataset.duplicates == "drop"
        first = first_of_each(self.counts["content"])
        return self._repeats(first, "duplicate", "says the same as", drop=drop)

    def near_duplicates(self, sketches: Sketches | None) -> int:
        """Rows that share most of their words with an earlier one."""
        if sketches is None or not len(sketches):
            return 0
        chat = self.counts["chat"]
        first_row = np.searchsorted(chat, np.arange(len(sketches)))  # chats are in order
        first = first_row[sketches.near()[chat]]
        drop = self.dataset.near_duplicates == "drop"
        return self._repeats(first, "near_duplicate", "says nearly the same as", drop=drop)

    def split(self) -> Split:
        """Training and validation."""
        weights = np.array([one.weight for one in self.inputs])[self.counts["file"]]
        train_only = np.array([one.train_only for one in self.inputs])[self.counts["file"]]
        divided = self.kept & ~train_only  # the split is the same as without the others
        fraction = self.dataset.validation_fraction
        split = split_rows(self.counts["group"], divided, weights, fraction)
        added = np.flatnonzero(self.kept & train_only)
        return Split(np.concatenate([split.train, added]), split.validation)

    def leaks(self, split: Split) -> int:
        """Validation rows that ask what a training row asks."""
        found = leaks(self.counts["question"], split.train, split.validation)
        for row, other in found:
            text = f"is held out, and asks what {self._name(other, beside=row)} asks in training"
            self._note(row, "leak", text, KEPT)
        return len(found)


def choose(
    recipe: Recipe,
    inputs: Sequence[Input],
    account: RowReport,
    rows: Path,
    sketches: Sketches | None = None,
) -> Chosen:
    """Leave out what repeats, split, look for leaks, and pack.

    Args:
        recipe: What to do.
        inputs: Where the rows come from.
        account: Gets every duplicate and leak.
        rows: The row file.
        sketches: Of the chats, where near duplicates are asked for.
    """
    chooser = _Chooser(recipe, inputs, account, rows)
    duplicates, near = chooser.duplicates(), chooser.near_duplicates(sketches)
    split = chooser.split()
    packing = pack(
        chooser.counts["length"][split.train], recipe.dataset.max_length, recipe.train.seed
    )
    return Chosen(chooser.counts, split, packing, duplicates, near, chooser.leaks(split))


def histogram(
    lengths: npt.NDArray[Any], long_lengths: npt.NDArray[Any], max_length: int
) -> dict[str, Any]:
    """How many rows have how many tokens, up to a little beyond the cut or the longest row."""
    longest = int(max(lengths.max(initial=1), long_lengths.max(initial=1)))
    edges = np.linspace(0, min(longest, 4 * max_length), BINS + 1)
    # what is longer still is counted in the last bin
    kept, _ = np.histogram(np.minimum(lengths, edges[-1]), edges)
    long, _ = np.histogram(np.minimum(long_lengths, edges[-1]), edges)
    return {
        "edges": [round(float(edge), 1) for edge in edges],
        "rows": kept.tolist(),
        "too_long": long.tolist(),
    }


def counted(values: npt.NDArray[Any]) -> int:
    """A sum as a plain number."""
    return int(values.sum(dtype=np.int64))


def figures_of(chosen: Chosen, dataset_length: int, account: RowReport) -> dict[str, Any]:
    """What the choice comes to, in numbers."""
    counts, train = chosen.counts, chosen.split.train
    lengths, trained = chosen.lengths, counts["num_trained"][train]
    tokens = counted(lengths)
    long = np.frombuffer(account.long_lengths, dtype=np.int64)
    return {
        "rows_train": len(train),
        "rows_validation": len(chosen.split.validation),
        "rows_duplicate": chosen.rows_duplicate,
        "rows_near_duplicate": chosen.rows_near,
        "leaks": chosen.num_leaks,
        "tokens": tokens,
        "trained_tokens": counted(trained),
        "longest_tokens": int(lengths.max(initial=0)),
        "most_trained_tokens": int(trained.max(initial=0)),
        "lengths": histogram(lengths, long, dataset_length),
        "packing": {
            "rows": len(chosen.packing),
            "max_length": dataset_length,
            "fill": round(chosen.packing.fill(lengths), 4),
            "fill_without": round(tokens / max(1, len(train) * dataset_length), 4),
        },
    }
