"""Rows of one file: JSON lines, a JSON array, CSV, Parquet, Arrow or plain text.

The number of a row is its line in JSON lines, CSV and text, and its position, from 1, in an array,
Parquet and Arrow. A row that cannot be read is a `RowFault` in its place.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby, islice

import pyarrow as pa

from strixft.data.arrow import read_arrow, read_parquet
from strixft.data.streams import (
    BROKEN,
    MAX_ROW_BYTES,
    PARQUET,
    RawRow,
    close_quote,
    lines,
    open_bytes,
    to_utf8,
    too_large,
)
from strixft.formats.faults import DECODER, RowFault
from strixft.formats.messages import DataRow
from strixft.formats.sources import SourceFile
from strixft.support.errors import DataError
from strixft.support.units import MIB

Stream = io.BufferedReader

CHAT_COLUMNS = {"messages", "conversations", "chosen"}

NOT_CLOSED = ("unexpected end of data", "field larger than field limit")
"""Errors of the CSV reader at a quote that nothing closes, in the file or in `MAX_ROW_BYTES`."""

_EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
"""A first line by which Excel knows what divides the cells; it is not a header."""

_BLANK = " \t\r\n\ufeff"
_SIGN = re.compile(f"[^{_BLANK}]")

_HALF = re.compile("[\udc80-\udcff]")
"""Characters that `surrogateescape` makes of bytes that are not UTF-8."""

_LENIENT = json.JSONDecoder(parse_constant=str, parse_int=float)
"""Finds the end of a value that the strict decoder refuses for what it says."""


def _as_row(value: object) -> DataRow | RowFault:
    if isinstance(value, dict):
        return value
    return RowFault("not_object", f"is a JSON {type(value).__name__}, not an object")


def _utf8_fault(error: UnicodeDecodeError) -> RowFault:
    return RowFault("not_utf8", f"is not UTF-8 text (byte {error.start + 1})")


def _parse_row(line: bytes) -> DataRow | RowFault:
    try:
        value, end = DECODER.raw_decode(text := line.decode("utf-8-sig").strip(_BLANK))
    except UnicodeDecodeError as error:
        return _utf8_fault(error)
    except RecursionError:
        return RowFault("not_json", "is not JSON that can be read: nested too deeply")
    except ValueError as error:  # of the decoder, its hooks, and int() of too many digits
        return RowFault("not_json", f"is not JSON: {error}")
    if end < len(text):
        return RowFault("not_json", f"has more after the object, from character {end + 1}")
    return _as_row(value)


class _Array:
    """A JSON array, read row by row; docs/data.md tells the reason for our own reader."""

    def __init__(self, stream: Stream, file: SourceFile) -> None:
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._place, self._ended, self._number = "", 0, False, 0

    def _more(self) -> bool:
        data = self._stream.read(max(MIB, len(self._text) - self._place))
        self._ended = not data
        self._text = self._text[self._place :] + self._decoder.decode(data, self._ended)
        self._place = 0
        return not self._ended

    def _sign(self) -> str:
        """Go to the next character that is not a space, and return it; empty at the end."""
        while (match := _SIGN.search(self._text, self._place)) is None:
            self._place = len(self._text)
            if not self._more():
                return ""
        self._place = match.start()
        return match[0]

    def _broken(self, problem: str) -> DataError:
        return DataError(
            f"{self._file.name}, row {self._number}: {problem}; the rows after it cannot be read",
            fix="correct the file there, or save it as JSON lines: a bad line spoils no other",
        )

    def _value(self) -> tuple[object, int]:
        """Return the value at this place, or the fault of one, and the place after it.

        Raises:
            DataError: Nothing shows where it ends.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended or isinstance(value, dict):
                    return value, end
            except json.JSONDecodeError as error:
                if len(self._text) - self._place > MAX_ROW_BYTES:
                    raise self._broken(too_large().problem) from None
                if self._ended:
                    problem = error.msg if self._text.strip() else "the file ends"
                    raise self._broken(f"is not JSON: {problem}") from None
            except RecursionError:
                raise self._broken("is nested too deeply") from None
            except ValueError as error:  # of the decoder's hooks: it is JSON all the same
                fault = RowFault("not_json", f"is not JSON: {error}")
                try:
                    return fault, _LENIENT.raw_decode(self._text, self._place)[1]
                except (ValueError, RecursionError):
                    raise self._broken(fault.problem) from None
            self._more()  # the value, or a number's last digits, may go on

    def rows(self) -> Iterator[RawRow]:
        self._sign()
        self._place += 1  # the opening bracket
        sign = "" if self._sign() == "]" else ","
        while sign == ",":
            self._number += 1
            self._sign()
            value, end = self._value()
            size = end - self._place
            row = value if isinstance(value, RowFault) else _as_row(value)
            if not self._text.isascii() and _HALF.search(self._text, self._place, end):
                row = RowFault("not_utf8", "is not UTF-8 text")
            yield RawRow(self._number, row, size)
            self._place = end
            sign = self._sign()
            if sign not in ("]", ","):
                raise self._broken("is not followed by a comma or a closing bracket")
            self._place += sign == ","
        self._place += 1
        if self._sign():
            raise self._broken("is the last of the array, and more follows")


def _read_json(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    start = stream.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        yield from _Array(stream, file).rows()
    elif start.startswith(b"{") and file.kind == "json" and (row := _one_object(file)) is not None:
        yield RawRow(1, row, MAX_ROW_BYTES)
    else:
        for number, line in lines(stream):
            if isinstance(line, RowFault):
                yield RawRow(number, line, 0)
            else:
                yield RawRow(number, _parse_row(line), len(line))


def _one_object(file: SourceFile) -> DataRow | None:
    """Return the row of a file that is one object; None for JSON lines.

    Raises:
        DataError: The object holds the rows in one of its keys, such as `{"data": [...]}`.
    """
    with open_bytes(file) as stream:
        text = stream.read(MAX_ROW_BYTES).decode("utf-8-sig", "replace").strip()
    try:
        value: DataRow = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows]
    held = [key for key in lists if isinstance(value[key][0], dict) and key not in CHAT_COLUMNS]
    if held and not CHAT_COLUMNS & set(lists):
        raise DataError(
            f"{file.name} is one JSON object that holds its rows in {held[0]!r}",
            fix=f"jq -c '.[\"{held[0]}\"][]' {file.name} > rows.jsonl   and name rows.jsonl",
        )
    return value


def _text_lines(stream: Stream, file: SourceFile) -> Iterator[str]:
    """Yield lines for the CSV reader, with their line ends."""
    encoding = "utf-8-sig"
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{file.name} has a line of more than {MAX_ROW_BYTES // MIB} MiB",
                fix="check that it is CSV, and where a quote is not closed",
            )
        yield line.decode(encoding, "surrogateescape")
        encoding = "utf-8"


def _check_header(names: list[str], file: SourceFile) -> None:
    if any(map(_HALF.search, names)):
        raise DataError(
            f"{file.name}, row 1: the header is not UTF-8 text",
            fix=to_utf8(file.name) or "save it as UTF-8",
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"{file.name} has the column {twice[0]!r} twice", fix="give each column its own name"
        )


def _cells(cells: list[str], header: list[str]) -> DataRow | RowFault:
    if len(cells) != len(header):
        return RowFault("bad_cells", f"has {len(cells)} cells, the header has {len(header)}")
    if any(not cell.isascii() and _HALF.search(cell) for cell in cells):
        return RowFault("not_utf8", "is not UTF-8 text")
    for name, cell in zip(header, cells, strict=True):
        if cell[:1] == " " and cell.endswith('"') and cell.lstrip(" ")[0] == '"':
            return RowFault(
                "not_csv",
                f"is not CSV: there is a space before the quotes of {name!r}, which would"
                " then be part of its text",
            )
    return dict(zip(header, cells, strict=True))


def _read_csv(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    start = stream.peek(65536).decode("utf-8-sig", "replace").splitlines()
    first = start[0] if start else ""
    delimiter = "\t" if ".tsv" in file.path.name.lower() else max(",;\t", key=first.count)
    skipped = 0
    if named := _EXCEL_DELIMITER.fullmatch(first):
        delimiter, skipped = named[1], 1
    csv.field_size_limit(MAX_ROW_BYTES)
    text = islice(_text_lines(stream, file), skipped, None)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(
            f"{file.name}, row 1: the header is not CSV: {error}", fix="correct the first line"
        ) from None
    _check_header(header, file)
    while True:
        number = reader.line_num + skipped + 1
        try:
            cells = next(reader)
            if cells:
                yield RawRow(number, _cells(cells, header), sum(map(len, cells)))
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num + skipped
            if number == last:
                fault = RowFault("not_csv", f"is not CSV: {error}")
            elif str(error).startswith(NOT_CLOSED):
                raise DataError(
                    f"{file.name}, row {number}: has a quote that is never closed; the lines"
                    f" {number + 1} to {last} after it cannot be read",
                    fix=close_quote(file.name, number),
                ) from None
            else:
                told = f"has a quote that stays open to line {last}: {error}"
                fault = RowFault("open_quote", told)
            yield RawRow(number, fault, 0)


def _read_text(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    """Yield paragraphs: lines up to a blank one, which `lines` leaves out."""

    def run_of(one: tuple[int, tuple[int, bytes | RowFault]]) -> tuple[bool, int]:
        index, (number, line) = one
        return isinstance(line, RowFault), number - index

    for _, paragraph in groupby(enumerate(lines(stream)), key=run_of):
        parts: list[bytes] = []
        first = size = 0
        for _, (number, line) in paragraph:
            if isinstance(line, RowFault):
                yield RawRow(number, line, 0)
                continue
            first, size = first or number, size + len(line)
            if size <= MAX_ROW_BYTES:
                parts.append(line.rstrip(b"\r\n"))
        if size:
            row: DataRow | RowFault = too_large()
            if size <= MAX_ROW_BYTES:
                try:
                    row = {"text": b"\n".join(parts).decode("utf-8-sig").rstrip()}
                except UnicodeDecodeError as error:
                    row = _utf8_fault(error)
            yield RawRow(first, row, size)


READERS: dict[str, Callable[[Stream, SourceFile], Iterator[RawRow]]] = {
    "jsonl": _read_json,
    "json": _read_json,
    "csv": _read_csv,
    "text": _read_text,
}


def raw_rows(file: SourceFile) -> Iterator[RawRow]:
    """Yield the rows of a file, faults included.

    Raises:
        DataError: The file as a whole cannot be read, or not to its end.
    """
    kind = "an Arrow file" if file.kind == "arrow" else ""  # of columns; others are streams
    number = 0
    try:
        with contextlib.ExitStack() as opened:
            if kind:
                rows = read_arrow(file)
            elif (stream := opened.enter_context(open_bytes(file))).peek(4).startswith(PARQUET):
                kind, rows = "Parquet", read_parquet(file)
            elif file.kind == "parquet":
                raise DataError(f"{file.name} is not Parquet", fix="copy or download it again")
            else:
                rows = READERS[file.kind](stream, file)
            for raw in rows:
                number = raw.number
                yield raw
    except (*BROKEN, OSError, pa.ArrowException) as error:
        fix = "copy or download it again"
        if kind:
            first = str(error).splitlines()[0]
            told = f"is not {kind} that can be read after row {number}: {first}"
        elif isinstance(error, BROKEN):
            told = f"breaks off after row {number}: {str(error) or type(error).__name__}"
            fix += "; gzip -t or zstd -t   shows if it is complete"
        else:
            place = f" after row {number}" if number else ""
            told = f"cannot be read{place}: {getattr(error, 'strerror', None) or error}"
            fix = "check the disk and the file"
        raise DataError(f"{file.name} {told}", fix=fix) from None
