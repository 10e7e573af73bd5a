"""Count rows by what became of them, and show a few of them as trained."""

from __future__ import annotations

import contextlib
import json
import shlex
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data.load import Input, Problem, expected_rows
from strixft.data.streams import close_quote, to_utf8
from strixft.recipe.schema import Dataset
from strixft.support.errors import DataError

SHOWN_ROWS, SHOWN_PROBLEMS = 5, 5

SHOWN_CHARACTERS = 1500
"""Shown of each run of trained or masked text: its start and its end."""

SHOWN_RUNS = 40
"""Shown of a row: the first and the last of them."""

LEFT_OUT, KEPT = "left out", "kept"
BAD, TOO_LONG = "bad", "too_long"


def runs(trained: Sequence[bool] | npt.NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """Return stretches of tokens that are trained, or are not: start, end, True if trained.

    >>> runs([False, True, True])
    [(0, 1, False), (1, 3, True)]
    """
    flags = np.asarray(trained, dtype=np.bool_)
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return [(a, b, bool(flags[a])) for a, b in pairwise(edges) if a < b]


def _short(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def example(row: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """Return one token row as text, for the report.

    Args:
        row: Of the row file.
        tokenizer: Decodes.
        file: The file of the row.
    """
    ids = row["input_ids"]

    def decoded(start: int, end: int) -> str:
        text = tokenizer.decode(
            ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return _short(str(text))

    every = shown = runs(row["trained"])
    if len(every) > SHOWN_RUNS:
        half = SHOWN_RUNS // 2
        shown = [*every[:half], *every[-half:]]
    return {
        "file": file,
        "row": row["row"],
        "part": row["part"],
        "tokens": len(ids),
        "trained_tokens": int(sum(row["trained"])),
        "runs_left_out": len(every) - len(shown),
        "runs": [[decoded(start, end), flag] for start, end, flag in shown],
    }


def spread(lengths: npt.NDArray[Any], count: int = SHOWN_ROWS) -> list[int]:
    """Return indices of a few rows from the shortest to the longest.

    >>> spread(np.array([5, 1, 9, 3, 2]), 3)
    [1, 3, 2]
    """
    order = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [int(order[round(float(place))]) for place in places]


class RowReport(contextlib.ExitStack):
    """Counts rows and writes every problem down while the rows stream through.

    Args:
        path: File of the problems, one JSON object a line.
        dataset: What the recipe allows.
    """

    def __init__(self, path: Path, dataset: Dataset) -> None:
        super().__init__()
        self.path = path
        self.dataset = dataset
        self.rows_read = self.rows_bad = self.rows_too_long = self.rows_left_out = 0
        self.long_lengths = array("q")
        """Tokens of the rows that are too long, as far as they were counted."""
        self.kinds: dict[str, dict[str, Any]] = {}
        self._shown: dict[str, list[Problem]] = {BAD: [], TOO_LONG: []}
        self._first_bad: dict[str, Problem] = {}
        self._keys: dict[str, None] = {}
        """Keys without which bad rows could be used, in the order of the rows."""
        temporary = path.with_name(f".{path.name}.new")
        self._file = temporary.open("w", encoding="utf-8")
        self.callback(temporary.replace, path)
        self.callback(self._file.close)

    def note(self, problem: Problem) -> None:
        """Write a problem down."""
        self._file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        kind = self.kinds.setdefault(
            problem.kind, {"rows": 0, "first": str(problem), "action": problem.action}
        )
        kind["rows"] += 1

    def take(self, weight: str, problem: Problem, num_tokens: int = 0) -> None:
        """Write a problem down, and count its row.

        Args:
            weight: `bad`, `too_long`, `left_out` on request, or `note` for a row that is used.
            problem: The problem.
            num_tokens: Of a row that is too long.
        """
        self.note(problem)
        self.rows_left_out += weight == "left_out"
        if weight == TOO_LONG:
            self.rows_too_long += 1
            self.long_lengths.append(num_tokens)
        if weight == BAD:
            self.rows_bad += 1
            self._first_bad.setdefault(problem.kind, problem)
            if problem.key is not None:
                self._keys[problem.key] = None
        if weight in self._shown and len(self._shown[weight]) < SHOWN_PROBLEMS:
            self._shown[weight].append(problem)

    def _refuse(self, problems: Iterable[Problem], count: int, fix: str) -> None:
        listed = "".join(f"\n  {problem}" for problem in problems)
        more = count - SHOWN_PROBLEMS
        rest = f"\n  … and {more} more; all of them: {self.path}" if more > 0 else ""
        raise DataError(
            f"{count} of {self.rows_read} rows of {', '.join(self.dataset.sources())}"
            f" cannot be used:{listed}{rest}",
            fix=fix,
        )

    def _nothing_left(self, inputs: Sequence[Input]) -> str:
        """Return the fix where leaving rows out would leave none."""
        if self.rows_bad < max(1, self.rows_read):
            return "check the rows, dataset.format and dataset.max_length"
        first = next(iter(self._first_bad.values()))
        return expected_rows(next(one for one in inputs if one.name == first.file))

    def _fix_of_bad(self, rows_kept: int, inputs: Sequence[Input]) -> str:
        if quote := self._first_bad.get("open_quote"):  # it holds good rows: not left out
            return close_quote(quote.file, quote.row)
        least = -(-self.rows_bad * 100 // self.rows_read) / 100
        fix = f"correct these rows, or leave them out: --set dataset.max_bad_fraction={least:g}"
        if rows_kept == 0:
            fix = self._nothing_left(inputs)
        if self._keys:
            names = json.dumps([*self.dataset.ignore, *self._keys])
            ignore = shlex.quote(f"dataset.ignore={names}")
            return f"--set {ignore}   trains without these keys; else {fix}"
        other = self._first_bad.get("not_utf8")
        if other and (convert := to_utf8(other.file)):
            return f"{convert}; else {fix}"
        return fix

    def check(self, rows_kept: int, inputs: Sequence[Input]) -> None:
        """Raise if more is wrong than the recipe allows, or nothing is left.

        Args:
            rows_kept: Token rows that were made.
            inputs: The sources of the rows.

        Raises:
            DataError: With the first rows of each kind, and the setting that allows them.
        """
        if self.rows_bad > self.dataset.max_bad_fraction * self.rows_read:
            self._refuse(self._shown[BAD], self.rows_bad, self._fix_of_bad(rows_kept, inputs))
        long = self._shown[TOO_LONG]
        if long and self.dataset.too_long == "error":
            fix = "--set dataset.too_long=drop   or a larger dataset.max_length"
            self._refuse(long, self.rows_too_long, fix)
        if rows_kept == 0:
            problems = [*self._shown[BAD], *long][:SHOWN_PROBLEMS]
            count = self.rows_bad + self.rows_too_long
            fix = self._nothing_left(inputs)
            self._refuse(problems, count or self.rows_read, fix)
