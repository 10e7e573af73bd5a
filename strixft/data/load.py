"""The rows of a data set as chats, with a problem for each that is none.

Every source is a file, a folder, a pattern or a data set of the hub; every file of it has a format
of its own, unless the recipe names one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from strixft.data.arrow import changes_of, rows_of
from strixft.data.checks import check_chat
from strixft.data.readers import RawRow, raw_rows
from strixft.data.streams import close_quote, to_utf8
from strixft.formats.detect import fitting, suggest_columns
from strixft.formats.faults import RowFault, shown
from strixft.formats.messages import Chat, Row
from strixft.formats.sources import HUB, SourceFile, find_files, is_hub
from strixft.formats.table import FORMATS, Format
from strixft.recipe.schema import Dataset, Source
from strixft.support.errors import DataError

LOOKED_AT = 1000
"""Rows that are looked at for one that shows the format."""

ROWS_OF = {
    "jsonl": "put one JSON object per line into it",
    "json": "put an array of JSON objects into it, or one object per line",
    "csv": "put a line of column names into it, and rows with as many cells",
    "parquet": "put rows into it",
    "arrow": "put rows into it",
    "text": "put paragraphs into it, with a blank line between them",
}
"""Kind of a file → what it should hold."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is left out or that somebody should look at, and why."""

    file: str
    row: int
    """The line, or the position in an array or Parquet file, from 1."""
    kind: str
    text: str
    action: str = "left out"
    key: str | None = None
    """Key without which the row could be used."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one line of `problems.jsonl`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}, row {self.row}: {self.text}"


@dataclass(frozen=True, slots=True)
class Input:
    """One file, or one data set of the hub, and how its rows are read."""

    source: SourceFile | HubSet
    form: Format
    columns: Mapping[str, str]
    weight: float = 1.0
    train_only: bool = False
    """None of its rows is held out."""
    ignored: frozenset[str] = frozenset()
    """Keys of rows, messages and calls that are left out on purpose."""
    detected: bool = False
    """The first row showed the format; the others have to show the same."""

    @property
    def name(self) -> str:
        """The file's path, or the data set's id."""
        return self.source.name

    def raw_rows(self) -> Iterator[RawRow]:
        """Rows as they stand there: number, row or fault, and about how many bytes it takes."""
        return _raw_rows(self.source)


def _raw_rows(source: SourceFile | HubSet) -> Iterator[RawRow]:
    return raw_rows(source) if isinstance(source, SourceFile) else source.rows()


def value_at(row: Any, path: str) -> Any:
    """What a dotted path leads to; None where it leads nowhere.

    >>> value_at({"runs": [{"output": "ok"}]}, "runs.0.output")
    'ok'
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    here, _, rest = path.partition(".")
    if isinstance(row, Mapping) and here in row and rest:
        return value_at(row[here], rest)
    if isinstance(row, list) and here.isdecimal() and int(here) < len(row):
        return value_at(row[int(here)], rest) if rest else row[int(here)]
    return None


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with its columns under our names.

    Args:
        row: As it stands in the file.
        columns: Our name → a column there, or a dotted path into one.
    """
    if not columns:
        return row
    used = {theirs if theirs in row else theirs.partition(".")[0] for theirs in columns.values()}
    others = {name: value for name, value in row.items() if name not in used}
    return {**others, **{ours: value_at(row, theirs) for ours, theirs in columns.items()}}


def _fix_of_first(source: SourceFile | HubSet, row: int, kind: str) -> str:
    """What to type where no row of a source can be read; of the first one, its fault."""
    if kind == "open_quote":
        return close_quote(source.name, row)
    if kind == "not_utf8" and (convert := to_utf8(source.name)):
        return convert
    return ROWS_OF.get(source.kind if isinstance(source, SourceFile) else "", ROWS_OF["jsonl"])


def _first_row(source: SourceFile | HubSet) -> tuple[int, Row]:
    """The first row that can be read.

    Raises:
        DataError: There is none.
    """
    first: tuple[int, RowFault] | None = None
    count = 0
    for count, (number, row, _) in enumerate(_raw_rows(source), start=1):
        if not isinstance(row, RowFault):
            return number, row
        first = first or (number, row)
        if count >= LOOKED_AT:
            break
    if first is None:
        raise DataError(f"{source.name} holds no rows", fix=_fix_of_first(source, 1, "no_rows"))
    more = f"; none of the first {count} rows can be read" if count > 1 else ""
    raise DataError(
        f"{source.name}, row {first[0]}: {first[1].problem}{more}",
        fix=_fix_of_first(source, first[0], first[1].kind),
    )


def _set_format(forms: list[Format]) -> str:
    return "   or   ".join(f"--set dataset.format={form.name}" for form in forms)


def _columns(row: Row) -> str:
    return ", ".join(shown(column, 40) for column in list(row)[:30])


def _no_format(name: str, number: int, row: Row) -> DataError:
    mapping = suggest_columns(row)
    known = "; ".join(
        f"{form.name} ({', '.join(sorted(form.columns))})"
        for form in FORMATS.values()
        if form.detected
    )
    if mapping:
        written = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
        fix = f"--set 'dataset.columns={{{written}}}'"
    else:
        fix = f"--set 'dataset.columns={{prompt: …, completion: …}}'   formats are {known}"
    return DataError(f"{name}, row {number}: no format has the columns {_columns(row)}", fix=fix)


def find_format(source: SourceFile | HubSet, name: str, columns: Mapping[str, str]) -> Format:
    """The format that the recipe names, or the one that the first row's columns show.

    Args:
        source: A file or a data set.
        name: A row of `FORMATS`, or `auto`.
        columns: Our names of its columns.

    Raises:
        DataError: There are no rows, no format fits, or several do.
    """
    number, raw = _first_row(source)
    if name != "auto":
        return FORMATS[name]
    row = renamed(raw, columns)
    empty = dict.fromkeys(row, "")  # the first row may have a null where others have their chat
    forms = fitting(row, frozenset(columns)) or fitting(empty, frozenset(columns))
    if len(forms) == 1:
        return forms[0]
    if not forms:
        raise _no_format(source.name, number, raw)
    names = " and ".join(form.name for form in forms)
    raise DataError(
        f"{source.name}, row {number}: the columns {', '.join(sorted(row))} fit {names}",
        fix=_set_format(forms),
    )


def expected_rows(one: Input) -> str:
    """The fix for an input of which no row can be used: its columns, and what its format reads."""
    number, raw = _first_row(one.source)
    fits = fitting(renamed(raw, one.columns), frozenset(one.columns))
    named = ", ".join(f"{name}: …" for name in sorted(one.form.columns))
    other = f"--set 'dataset.columns={{{named}}}'   or another dataset.format"
    typed = other if one.form in fits or not fits else _set_format(fits)
    return (
        f"correct the rows, or {typed}: row {number} has the columns {_columns(raw)}; the format"
        f" {one.form.name} reads rows such as {json.dumps(one.form.example)}"
    )


def sources_of(dataset: Dataset) -> list[Source]:
    """The sources of a recipe, one or several, each with what it does not say itself filled in."""
    given = dataset.source
    several = given if isinstance(given, list) else [Source(source=given)]
    return [
        source.model_copy(
            update={
                "format": source.format or dataset.format,
                "columns": dataset.columns if source.columns is None else source.columns,
            }
        )
        for source in several
    ]


def open_inputs(dataset: Dataset, *, offline: bool = False) -> list[Input]:
    """Every file and data set of a recipe, in order, with its format.

    Raises:
        DataError: One is missing or empty, or no format fits it.
    """
    inputs = []
    for source in sources_of(dataset):
        found: list[SourceFile] | list[HubSet] = (
            [open_hub(source.source, source.split, offline=offline)]
            if is_hub(source.source)
            else find_files(source.source)
        )
        columns = source.columns or {}
        for one in found:
            form = find_format(one, source.format or "auto", columns)
            inputs.append(
                Input(
                    one,
                    form,
                    columns,
                    source.weight,
                    ignored=frozenset(dataset.ignore),
                    detected=source.format in (None, "auto"),
                )
            )
    kinds = {one.form.kind: one for one in inputs}
    if len(kinds) > 1 and set(kinds) != {"chat", "text"}:
        listed = ", ".join(f"{one.name} ({one.form.name})" for one in kinds.values())
        raise DataError(
            f"the sources cannot be trained together: {listed}",
            fix="use one of them, or read pairs as chats: --set dataset.format=chosen",
        )
    return inputs


def _check_format(one: Input, row: Row) -> None:
    """Refuse a row whose columns show another format than the first row's, or several."""
    fits = [form.name for form in fitting(row, frozenset(one.columns))]
    if fits and fits != [one.form.name]:
        raise RowFault(
            "other_format",
            f"has the columns of {' and '.join(fits)}, and the first row those of {one.form.name};"
            f" --set dataset.format={one.form.name} reads all rows as the first",
        )


def read_row(one: Input, raw: Row | RowFault) -> Chat:
    """A row of an input as a checked chat.

    Raises:
        RowFault: It is none.
    """
    if isinstance(raw, RowFault):
        raise raw
    try:
        row = renamed(raw, one.columns)
        if one.detected:
            _check_format(one, row)
        chat = one.form.to_chat(row, one.ignored)
        check_chat(chat)
    except RecursionError:
        raise RowFault("not_json", "is nested too deeply") from None
    return chat


def group_of(raw: Row, column: str) -> str:
    """The value whose rows stay on one side of the split.

    Raises:
        RowFault: The row has none.
    """
    value = value_at(raw, column)
    if value is None:
        raise RowFault("no_group", f"has no {column!r}, which dataset.group_by names")
    return str(value)


def read_rows(one: Input) -> Iterator[tuple[int, Chat] | Problem]:
    """The rows of an input as checked chats with their numbers; a problem for each that is none.

    Args:
        one: What to read.
    """
    for number, raw, _ in one.raw_rows():
        try:
            yield number, read_row(one, raw)
        except RowFault as fault:
            yield Problem(one.name, number, fault.kind, fault.problem, key=fault.key)


ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class HubSet:
    """One split of a data set of the hub, as Arrow on disk."""

    name: str
    rows_on_disk: Any
    """A `datasets.Dataset`."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data set does."""
        return str(self.rows_on_disk._fingerprint)

    def rows(self) -> Iterator[tuple[int, Row | RowFault, int]]:
        """The rows, numbered from 1."""
        number = 0
        rows = self.rows_on_disk.with_format("arrow")
        changes = changes_of(rows.data.schema, self.name)
        for table in rows.iter(ROWS_AT_ONCE):
            for row in rows_of(table, changes):
                number += 1
                yield number, row, table.nbytes // table.num_rows


def open_hub(source: str, split: str, *, offline: bool) -> HubSet:
    """A data set of the hub; from the cache alone where there is no network.

    Args:
        source: `hub:owner/name`, or `hub:owner/name:subset`.
        split: Which of its splits.
        offline: Never ask the network.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    import datasets

    name, _, subset = source.removeprefix(HUB).partition(":")
    settings = datasets.DownloadConfig(local_files_only=offline)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline  # then it looks into its cache alone
    try:
        found = datasets.load_dataset(name, subset or None, split=split, download_config=settings)
    except Exception as error:  # the library raises what its many back ends raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set {name!r} of the hub cannot be loaded: {first}",
            fix="is it a file? then correct its path, relative to the recipe's file; else: is the"
            f" network there, is it gated (hf auth login), is {split!r} one of its splits",
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return HubSet(f"{HUB}{name}", found)
