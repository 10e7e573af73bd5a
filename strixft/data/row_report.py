"""Count rows by what became of them, and show a few of them as trained."""

from __future__ import annotations

import contextlib
import json
import shlex
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from strixft.data.load import Input, expected_rows
from strixft.data.streams import close_quote, to_utf8
from strixft.recipe.schema import Dataset
from strixft.support.errors import DataError

SHOWN_ROWS, SHOWN_PROBLEMS = 5, 5

SHOWN_CHARACTERS = 1500
"""Shown of each run of trained or masked text: its start and its end."""

SHOWN_RUNS = 40
"""Shown of a row: the first and the last of them."""

LEFT_OUT, KEPT = "left out", "kept"

Weight = Literal["note", "bad", "too_long", "left_out"]
"""Count `rows_…` that a row goes to for a problem; `note`: it is used."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is left out, or that the user should look at, and the reason."""

    file: str
    row: int
    """Its line, or its position in an array or Parquet file, from 1."""
    kind: str
    text: str
    action: str = LEFT_OUT
    key: str | None = None
    """Key without which the row could be used."""
    weight: Weight = "note"
    tokens: int = 0
    """Tokens of a row that is too long."""

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}, row {self.row}: {self.text}"


@dataclass(slots=True)
class MadeBatch:
    """The token rows of a batch of raw rows, and the facts to report of them."""

    records: Any = None
    """Token rows, a `pyarrow.RecordBatch`; None if there are none."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the rows."""
    counts: Counter[str] = field(default_factory=Counter)
    """`rows_read`, `bytes_read`; `token_rows` and their `tokens`; `chats_divided` by templates that
    rewrite answers; `rows_chats` that could be read, and `rows_thinking` of them with reasoning;
    `tools_as_text`: chats with tools for which the template has no place;
    `mask_checked` rows whose mask was decoded, and `mask_equal` rows of them that were right."""
    unused: Counter[str] = field(default_factory=Counter)
    """Column, or key of messages, that is not read → rows that have it."""
    sketches: bytearray = field(default_factory=bytearray)
    """MinHash sketches of all chats, if near duplicates are asked for."""


def runs(trained: Sequence[bool] | npt.NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """Return stretches of tokens that are trained, or are not: start, end, True if trained.

    >>> runs([False, True, True])
    [(0, 1, False), (1, 3, True)]
    """
    flags = np.asarray(trained, dtype=np.bool_)
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return [(a, b, bool(flags[a])) for a, b in pairwise(edges) if a < b]


def example(row: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """Return one token row as text, for the report."""
    ids, half = row["input_ids"], SHOWN_CHARACTERS // 2

    def decoded(start: int, end: int) -> str:
        text: str = tokenizer.decode(
            ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if len(text) <= SHOWN_CHARACTERS:
            return text
        return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"

    every = shown = runs(row["trained"])
    if len(every) > SHOWN_RUNS:
        shown = [*every[: SHOWN_RUNS // 2], *every[-SHOWN_RUNS // 2 :]]
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
    """Counts rows and writes every problem down while the rows stream through."""

    def __init__(self, path: Path, dataset: Dataset) -> None:
        super().__init__()
        self.path, self.dataset = path, dataset
        self.counts, self.unused, self.sketches = Counter[str](), Counter[str](), bytearray()
        """Sums over all batches, as in `MadeBatch`; also `rows_bad` and what else `Weight` has."""
        self.long_lengths = array("q")
        """Tokens of the rows that are too long, as far as they were counted."""
        self.kinds: dict[str, dict[str, Any]] = {}
        self._shown: dict[Weight, list[Problem]] = {"bad": [], "too_long": []}
        self._first_bad: dict[str, Problem] = {}
        self._keys: dict[str, None] = {}
        """Keys without which bad rows could be used, in the order of the rows."""
        temporary = path.with_name(f".{path.name}.new")
        self._file = temporary.open("w", encoding="utf-8")
        self.callback(temporary.replace, path)
        self.callback(self._file.close)

    def take(self, made: MadeBatch) -> None:
        """Write the problems of a batch down, and count its rows."""
        for problem in made.problems:
            self.note(problem)
        self.sketches += made.sketches
        self.counts.update(made.counts)
        self.unused.update(made.unused)

    def note(self, problem: Problem) -> None:
        """Write a problem down, and count its row."""
        written = asdict(problem)
        weight, tokens = written.pop("weight"), written.pop("tokens")
        self._file.write(json.dumps(written, ensure_ascii=False) + "\n")
        first = {"rows": 0, "first": str(problem), "action": problem.action}
        self.kinds.setdefault(problem.kind, first)["rows"] += 1
        self.counts[f"rows_{weight}"] += 1
        if weight == "too_long":
            self.long_lengths.append(tokens)
        if weight == "bad":
            self._first_bad.setdefault(problem.kind, problem)
            self._keys |= {} if problem.key is None else {problem.key: None}
        if weight in self._shown and len(self._shown[weight]) < SHOWN_PROBLEMS:
            self._shown[weight].append(problem)

    def _refuse(
        self, problems: Iterable[Problem], count: int, fix: str, **settings: object
    ) -> None:
        listed = "".join(f"\n  {problem}" for problem in problems)
        more = count - SHOWN_PROBLEMS
        rest = f"\n  … and {more} more; all of them: {self.path}" if more > 0 else ""
        raise DataError(
            f"{count} of {self.counts['rows_read']} rows of {', '.join(self.dataset.sources())}"
            f" cannot be used:{listed}{rest}",
            fix=fix,
            settings={f"dataset.{name}": value for name, value in settings.items()},
        )

    def _nothing_left(self, inputs: Sequence[Input]) -> str:
        """Return the fix where leaving rows out would leave none."""
        if self.counts["rows_bad"] < max(1, self.counts["rows_read"]):
            return "check the rows, dataset.format and dataset.max_length"
        first = next(iter(self._first_bad.values()))
        return expected_rows(next(one for one in inputs if one.name == first.file))

    def _fix_of_bad(self, inputs: Sequence[Input]) -> tuple[str, dict[str, Any]]:
        """Return the fix, and the settings of `dataset` that it begins with."""
        if quote := self._first_bad.get("open_quote"):  # it holds good rows: not left out
            return close_quote(quote.file, quote.row), {}
        least = -(-self.counts["rows_bad"] * 100 // self.counts["rows_read"]) / 100
        fix = f"correct these rows, or leave them out: --set dataset.max_bad_fraction={least:g}"
        settings: dict[str, Any] = {}
        if not self.counts["token_rows"]:
            fix = self._nothing_left(inputs)
        if self._keys:
            settings = {"ignore": [*self.dataset.ignore, *self._keys]}
            typed = shlex.quote(f"dataset.ignore={json.dumps(settings['ignore'])}")
            return f"--set {typed}   trains without these keys; else {fix}", settings
        other = self._first_bad.get("not_utf8")
        convert = to_utf8(other.file) if other else None
        return f"{convert}; else {fix}" if convert else fix, settings

    def check(self, inputs: Sequence[Input]) -> None:
        """Raise if more is wrong than the recipe allows, or nothing is left.

        Raises:
            DataError: With the first rows of each kind, and the setting that allows them.
        """
        counts, bad, long = self.counts, self._shown["bad"], self._shown["too_long"]
        if counts["rows_bad"] > self.dataset.max_bad_fraction * counts["rows_read"]:
            fix, settings = self._fix_of_bad(inputs)
            self._refuse(bad, counts["rows_bad"], fix, **settings)
        if long and self.dataset.too_long == "error":
            fix = "--set dataset.too_long=drop   or a larger dataset.max_length"
            self._refuse(long, counts["rows_too_long"], fix, too_long="drop")
        if not counts["token_rows"]:
            count = counts["rows_bad"] + counts["rows_too_long"] or counts["rows_read"]
            self._refuse([*bad, *long][:SHOWN_PROBLEMS], count, self._nothing_left(inputs))
