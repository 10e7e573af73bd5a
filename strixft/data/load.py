"""Open the sources of a recipe, and read their rows as chats.

Every source is a file, a folder, a pattern or a data set of the hub; every file of it has a format
of its own, unless the recipe names one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from strixft.data.arrow import rows_of
from strixft.data.checks import check_chat
from strixft.data.readers import raw_rows
from strixft.data.streams import RawRow, close_quote, to_utf8
from strixft.formats.faults import RowFault, shown
from strixft.formats.known_formats import FORMATS, Format, fitting, suggest_columns
from strixft.formats.messages import Chat, DataRow
from strixft.formats.sources import HUB, SourceFile, find_files, is_hub
from strixft.recipe.schema import Dataset, Source
from strixft.support.errors import DataError
from strixft.support.private_hf import fingerprint_of

LOOKED_AT = 1000
"""Rows that are looked at for one that shows the format."""

HOLDS = {
    "jsonl": "put one JSON object per line into it",
    "json": "put an array of JSON objects into it, or one object per line",
    "csv": "put a line of column names into it, and rows with as many cells",
    "parquet": "put rows into it",
    "arrow": "put rows into it",
    "text": "put paragraphs into it, with a blank line between them",
}
"""Kind of a file → the fix for one without rows."""


@dataclass(frozen=True, slots=True)
class Input:
    """One file, or one data set of the hub, and its format."""

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
        """Return the rows as they are in the source."""
        return _raw_rows(self.source)


def _raw_rows(source: SourceFile | HubSet) -> Iterator[RawRow]:
    return raw_rows(source) if isinstance(source, SourceFile) else source.rows()


def value_at(row: Any, path: str) -> Any:
    """Return the value at a dotted path; None where it leads nowhere.

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


def _renamed(row: DataRow, columns: Mapping[str, str]) -> DataRow:
    """Return a row with its columns under our names: our name → a path there."""
    if not columns:
        return row
    used = {theirs if theirs in row else theirs.partition(".")[0] for theirs in columns.values()}
    others = {name: value for name, value in row.items() if name not in used}
    return {**others, **{ours: value_at(row, theirs) for ours, theirs in columns.items()}}


def _first_row(source: SourceFile | HubSet) -> tuple[int, DataRow]:
    """Return the first row that can be read, and its number.

    Raises:
        DataError: There is none.
    """
    faults: list[tuple[int, RowFault]] = []
    for number, row, _ in islice(_raw_rows(source), LOOKED_AT):
        if not isinstance(row, RowFault):
            return number, row
        faults.append((number, row))
    fix = HOLDS[source.kind if isinstance(source, SourceFile) else "parquet"]
    if not faults:
        raise DataError(f"{source.name} holds no rows", fix=fix)
    number, fault = faults[0]
    if fault.kind == "open_quote":
        fix = close_quote(source.name, number)
    if fault.kind == "not_utf8":
        fix = to_utf8(source.name) or fix
    more = f"; none of the first {len(faults)} rows can be read" if len(faults) > 1 else ""
    raise DataError(f"{source.name}, row {number}: {fault.problem}{more}", fix=fix)


def _set_format(forms: list[Format]) -> str:
    return "   or   ".join(f"--set dataset.format={form.name}" for form in forms)


def _columns(row: DataRow) -> str:
    return ", ".join(shown(column, 40) for column in list(row)[:30])


def find_format(source: SourceFile | HubSet, name: str, columns: Mapping[str, str]) -> Format:
    """Return the format that the recipe names, or the one that the first row's columns show.

    Raises:
        DataError: There are no rows, no format fits, or several do.
    """
    number, raw = _first_row(source)
    if name != "auto":
        return FORMATS[name]
    row = _renamed(raw, columns)
    empty = dict.fromkeys(row, "")  # the first row may have a null where others have their chat
    forms = fitting(row, frozenset(columns)) or fitting(empty, frozenset(columns))
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise DataError(
            f"{source.name}, row {number}: the columns {', '.join(sorted(row))} fit"
            f" {' and '.join(form.name for form in forms)}",
            fix=_set_format(forms),
            settings={"dataset.format": forms[0].name},
        )
    mapping = suggest_columns(raw) or dict.fromkeys(("prompt", "completion"), "…")
    written = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
    known = [f for f in FORMATS.values() if f.detected] if "…" in mapping.values() else []
    listed = "; ".join(f"{form.name} ({', '.join(sorted(form.columns))})" for form in known)
    more = f"   formats are {listed}" if known else ""
    raise DataError(
        f"{source.name}, row {number}: no format has the columns {_columns(raw)}",
        fix=f"--set 'dataset.columns={{{written}}}'{more}",
        settings={} if known else {"dataset.columns": mapping},
    )


def expected_rows(one: Input) -> str:
    """Return the fix for an input without a usable row: its columns, and those of its format."""
    number, raw = _first_row(one.source)
    fits = fitting(_renamed(raw, one.columns), frozenset(one.columns))
    named = ", ".join(f"{name}: …" for name in sorted(one.form.columns))
    other = f"--set 'dataset.columns={{{named}}}'   or another dataset.format"
    typed = other if one.form in fits or not fits else _set_format(fits)
    return (
        f"correct the rows, or {typed}: row {number} has the columns {_columns(raw)}; the format"
        f" {one.form.name} reads rows such as {json.dumps(one.form.example)}"
    )


def open_inputs(dataset: Dataset, *, offline: bool = False) -> list[Input]:
    """Return every file and data set of a recipe, in order, with its format.

    Raises:
        DataError: One is missing or empty, or no format fits it.
    """
    inputs = []
    given = dataset.source
    for source in given if isinstance(given, list) else [Source(source=given)]:
        name = source.format or dataset.format
        columns = dataset.columns if source.columns is None else source.columns
        found: Sequence[SourceFile | HubSet]
        if is_hub(source.source):
            found = [open_hub(source.source, source.split, offline=offline)]
        else:
            found = find_files(source.source)
        inputs += [
            Input(
                one,
                find_format(one, name, columns),
                columns,
                source.weight,
                ignored=frozenset(dataset.ignore),
                detected=name == "auto",
            )
            for one in found
        ]
    kinds = {one.form.kind: one for one in inputs}
    if len(kinds) > 1 and set(kinds) != {"chat", "text"}:
        listed = ", ".join(f"{one.name} ({one.form.name})" for one in kinds.values())
        raise DataError(
            f"the sources cannot be trained together: {listed}",
            fix="use one of them, or read pairs as chats: --set dataset.format=chosen",
        )
    return inputs


def read_row(one: Input, raw: DataRow | RowFault) -> Chat:
    """Return a row of an input as a checked chat.

    Raises:
        RowFault: It cannot be used.
    """
    if isinstance(raw, RowFault):
        raise raw
    try:
        row = _renamed(raw, one.columns)
        fits = fitting(row, frozenset(one.columns)) if one.detected else []
        if fits and fits != [one.form]:
            names = " and ".join(form.name for form in fits)
            raise RowFault(
                "other_format",
                f"has the columns of {names}, and the first row those of {one.form.name};"
                f" --set dataset.format={one.form.name} reads all rows as the first",
            )
        chat = one.form.to_chat(row, one.ignored)
        check_chat(chat)
    except RecursionError:
        raise RowFault("not_json", "is nested too deeply") from None
    return chat


HUB_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class HubSet:
    """One split of a data set of the hub, as Arrow on disk."""

    name: str
    rows_on_disk: Any
    """A `datasets.Dataset`."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data set does."""
        return fingerprint_of(self.rows_on_disk)

    def rows(self) -> Iterator[RawRow]:
        """Return the rows, numbered from 1."""
        rows = self.rows_on_disk.with_format("arrow")
        return rows_of(rows.iter(HUB_ROWS_AT_ONCE), rows.data.schema, self.name)


@contextlib.contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Let `datasets` look into its cache alone where `offline` is true."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def open_hub(source: str, split: str, *, offline: bool) -> HubSet:
    """Open a data set of the hub; from the cache alone where there is no network.

    Args:
        source: `hub:owner/name`, or `hub:owner/name:subset`.
        split: Name of one of its splits.
        offline: Never ask the network.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    import datasets

    name, _, subset = source.removeprefix(HUB).partition(":")
    settings = datasets.DownloadConfig(local_files_only=offline)
    try:
        with hub_offline(offline):
            found = datasets.load_dataset(
                name, subset or None, split=split, download_config=settings
            )
    except Exception as error:  # the library raises what its many back ends raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set {name!r} of the hub cannot be loaded: {first}",
            fix="is it a file? then correct its path, relative to the recipe's file; else: is the"
            f" network there, is it gated (hf auth login), is {split!r} one of its splits",
        ) from None
    return HubSet(f"{HUB}{name}", found)
