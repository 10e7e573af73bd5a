"""Stage `prepare`: from the data file to token rows whose trained tokens are known."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from strixft import views
from strixft.data import Encoder, Problem, RawRow, TokenRow, TokenRows, read_rows, write_rows
from strixft.data.load import find_format
from strixft.errors import DataError
from strixft.model import load_tokenizer
from strixft.recipe import Dataset, Recipe
from strixft.runs import Result, Run, digest, write_text
from strixft.units import format_number

ROWS_FILE = "rows.arrow"
PROBLEMS_FILE = "problems.jsonl"
ENCODED_AT_ONCE = 512
SHOWN_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    """What was read, what is left out and why, and what is trained."""

    name: ClassVar[str] = "prepare"

    def token_rows(self, dataset: Dataset) -> TokenRows:
        """The token rows on disk."""
        return TokenRows.load(self.folder / ROWS_FILE, dataset.validation_fraction)

    def _repr_html_(self) -> str:
        figures = self.figures
        shown = {
            "format": figures["format"],
            "rows read": format_number(figures["rows_read"]),
            "rows for training": format_number(figures["rows_train"]),
            "rows held out": format_number(figures["rows_validation"]),
            "bad rows left out": format_number(figures["rows_bad"]),
            "rows too long, left out": format_number(figures["rows_too_long"]),
            "tokens for training": format_number(figures["tokens"]),
            "of these trained": format_number(figures["trained_tokens"]),
            "longest row": f"{format_number(figures['longest_tokens'])} tokens",
        }
        problems = [
            [kind, found["rows"], found["first"]] for kind, found in figures["problems"].items()
        ]
        listed = views.table(problems, ["problem", "rows", "first"]) if problems else ""
        return views.mapping(shown) + listed


class _Account:
    """Counts rows and keeps every problem while the rows stream through."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.rows_read = 0
        self.bad: list[Problem] = []
        self.too_long: list[Problem] = []

    def readable(self, rows: Iterable[RawRow | Problem]) -> Iterator[RawRow]:
        for row in rows:
            self.rows_read += 1
            if isinstance(row, Problem):
                self.bad.append(row)
            else:
                yield row

    def encoded(self, rows: Iterable[RawRow], encoder: Encoder) -> Iterator[TokenRow]:
        for batch in _batched(rows, ENCODED_AT_ONCE):
            for found in encoder.encode([(row.row, row.messages) for row in batch]):
                if not isinstance(found, TokenRow):
                    number, fault = found
                    self.bad.append(Problem(number, fault.kind, fault.problem))
                elif len(found.input_ids) > self.dataset.max_length:
                    self._note_long(found)
                else:
                    yield found

    def _note_long(self, row: TokenRow) -> None:
        most = self.dataset.max_length
        text = f"has {len(row.input_ids)} tokens, max_length is {most}"
        self.too_long.append(Problem(row.row, "too_long", text))

    def problems(self) -> list[Problem]:
        return sorted([*self.bad, *self.too_long], key=lambda problem: problem.row)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        counts = Counter(problem.kind for problem in self.problems())
        first = {problem.kind: str(problem) for problem in reversed(self.problems())}
        return {kind: {"rows": count, "first": first[kind]} for kind, count in counts.items()}

    def _refuse(self, problems: list[Problem], fix: str) -> None:
        listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"\n  … and {more} more" if more > 0 else ""
        raise DataError(
            f"{len(problems)} of {self.rows_read} rows of {self.dataset.source}"
            f" cannot be used:{listed}{rest}",
            fix=fix,
        )

    def check(self, rows_kept: int) -> None:
        """Raise if more is wrong than the recipe allows, or nothing is left."""
        allowed = self.dataset.max_bad_fraction
        if len(self.bad) > allowed * self.rows_read:
            least = len(self.bad) / self.rows_read
            self._refuse(
                self.bad,
                f"correct these rows, or leave them out: --set dataset.max_bad_fraction="
                f"{-(-least * 100 // 1) / 100:g}",
            )
        if self.too_long and self.dataset.too_long == "error":
            self._refuse(self.too_long, "--set dataset.too_long=drop, or a larger max_length")
        if rows_kept == 0:
            self._refuse(self.problems(), "check the rows, dataset.format and dataset.max_length")


def _batched(rows: Iterable[RawRow], size: int) -> Iterator[tuple[RawRow, ...]]:
    stream = iter(rows)
    while batch := tuple(islice(stream, size)):
        yield batch


def _figures(account: _Account, rows: TokenRows, format_name: str) -> dict[str, Any]:
    lengths, trained = rows.train["num_tokens"], rows.train["num_trained"]
    return {
        "format": format_name,
        "rows_read": account.rows_read,
        "rows_train": len(rows.train),
        "rows_validation": len(rows.validation),
        "rows_bad": len(account.bad),
        "rows_too_long": len(account.too_long),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "longest_tokens": max(lengths),
        "most_trained_tokens": max(trained),
        "problems": account.by_kind(),
    }


def _template_digest(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _prepare(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    dataset = recipe.dataset
    source = Path(dataset.source)
    shape = find_format(source, dataset.format)
    tokenizer = load_tokenizer(recipe)
    encoder = Encoder(tokenizer, dataset.loss_on)
    account = _Account(dataset)
    kept = account.encoded(account.readable(read_rows(source, shape)), encoder)
    count = write_rows(folder / ROWS_FILE, kept)
    lines = [json.dumps(problem.to_dict(), ensure_ascii=False) for problem in account.problems()]
    write_text(folder / PROBLEMS_FILE, "".join(f"{line}\n" for line in lines))
    account.check(count)
    rows = TokenRows.load(folder / ROWS_FILE, dataset.validation_fraction)
    inputs = {
        "source": str(source),
        "source_sha256": digest(source),
        "chat_template_sha256": _template_digest(tokenizer),
        "rows_sha256": digest(folder / ROWS_FILE),
    }
    return inputs, _figures(account, rows, shape.name)


def prepare_recipe(run: Run) -> Prepared:
    """Load, check, format and mask the recipe's data; written to the run folder.

    Raises:
        DataError: The file, or more rows than allowed, are not what the format says.
    """
    return run.once(Prepared, lambda folder: _prepare(run.recipe, folder))
