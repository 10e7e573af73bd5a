"""Read a file of JSON lines, row by row, and keep account of every row that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strixft.errors import DataError
from strixft.formats import FORMATS, Format, Message, RowFault, detect_format
from strixft.tables import did_you_mean


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that is left out, and why."""

    row: int
    """Line of the file, from 1."""
    kind: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one line of `problems.jsonl`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"row {self.row}: {self.text}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as a chat."""

    row: int
    messages: list[Message]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowFault("not_utf8", f"is not UTF-8 text (byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowFault("not_json", f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RowFault("not_object", f"is a JSON {type(data).__name__}, not an object")
    return data


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _check_file(path: Path) -> None:
    if not path.is_file():
        files = (p.name for p in path.parent.glob("*") if p.is_file())
        near = did_you_mean(path.name, sorted(files)[:200])
        raise DataError(
            f"{path} is a folder, not a data file"
            if path.is_dir()
            else f"there is no data file {path}",
            fix=f"{near}   (dataset.source is relative to the recipe's file)"
            if path.parent.is_dir()
            else "correct dataset.source; it is relative to the recipe's file",
        )
    if not any(True for _ in _lines(path)):
        raise DataError(f"{path} is empty", fix="put one JSON object per line into it")


def find_format(path: Path, name: str) -> Format:
    """The format a recipe names, or the one that the first readable row's columns show.

    Raises:
        DataError: The file is missing or empty, or no format has these columns.
    """
    _check_file(path)
    if name != "auto":
        return FORMATS[name]
    for number, line in _lines(path):
        try:
            columns = frozenset(_parse(line))
        except RowFault:
            continue
        found = detect_format(columns)
        if found is None:
            raise DataError(
                f"{path}, row {number}: no format has the columns {', '.join(sorted(columns))}",
                fix="rename them to one of: "
                + "; ".join(
                    f"{row.name} ({', '.join(sorted(row.columns))})" for row in FORMATS.values()
                ),
            )
        return found
    number, line = next(_lines(path))
    try:
        _parse(line)
    except RowFault as fault:
        raise DataError(
            f"{path}, row {number} {fault.problem}", fix="put one JSON object per line into it"
        ) from None
    raise AssertionError("a row that could not be read was read")


def read_rows(path: Path, shape: Format) -> Iterator[RawRow | Problem]:
    """The rows of a file as chats, and a problem for each that is none."""
    for number, line in _lines(path):
        try:
            yield RawRow(number, shape.to_messages(_parse(line)))
        except RowFault as fault:
            yield Problem(number, fault.kind, fault.problem)
