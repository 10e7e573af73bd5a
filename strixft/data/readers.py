"""Rows of one file: JSON lines, a JSON array, CSV, Parquet, Arrow or plain text.

A reader yields each row with its number, or the fault of a row that cannot be read. The number is
the line for JSON lines, CSV and text, and the position, from 1, for an array, Parquet and Arrow.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from strixft.data.arrow import Change, changes_of, rows_of
from strixft.data.streams import (
    ARROW,
    MAX_RATIO,
    MAX_ROW_BYTES,
    PARQUET,
    RATIO_COUNTS_FROM,
    Stream,
    broken_file,
    close_quote,
    lines,
    open_bytes,
    to_utf8,
    too_large,
)
from strixft.formats.faults import DECODER, RowFault
from strixft.formats.messages import Row
from strixft.formats.sources import SourceFile
from strixft.support.errors import DataError
from strixft.support.units import MIB

RawRow = tuple[int, Row | RowFault, int]
"""Number, row or fault, and about how many bytes it takes."""

PARQUET_ROWS_AT_ONCE = 64

CHAT_COLUMNS = {"messages", "conversations", "chosen"}

NOT_CLOSED = ("unexpected end of data", "field larger than field limit")
"""What the CSV reader says of a quote that nothing closes, in the file or in `MAX_ROW_BYTES`."""

_EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
"""A first line by which Excel knows what divides the cells; it is no header."""

_BLANK = " \t\r\n\ufeff"

_HALF = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are no UTF-8."""


_LENIENT = json.JSONDecoder(parse_constant=str, parse_int=float)
"""Finds the end of a value that the strict decoder refuses for what it says."""


def _as_row(value: object) -> Row:
    if not isinstance(value, dict):
        raise RowFault("not_object", f"is a JSON {type(value).__name__}, not an object")
    return value


def parse_row(line: bytes) -> Row:
    """One line of JSON.

    Raises:
        RowFault: It is not UTF-8, not JSON, or not an object.
    """
    try:
        value, end = DECODER.raw_decode(text := line.decode("utf-8-sig").strip(_BLANK))
        if end < len(text):
            raise RowFault("not_json", f"has more after the object, from character {end + 1}")
    except UnicodeDecodeError as error:
        raise RowFault("not_utf8", f"is not UTF-8 text (byte {error.start + 1})") from None
    except RecursionError:
        raise RowFault("not_json", "is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # of the decoder, its hooks, and int() of too many digits
        raise RowFault("not_json", f"is not JSON: {error}") from None
    return _as_row(value)


def _read_lines(stream: Stream) -> Iterator[RawRow]:
    for number, line in lines(stream):
        if isinstance(line, RowFault):
            yield number, line, 0
            continue
        try:
            yield number, parse_row(line), len(line)
        except RowFault as fault:
            yield number, fault, 0


class _Array:
    """A JSON array that is read element by element, with a bounded part of it in memory."""

    def __init__(self, stream: Stream, file: SourceFile) -> None:
        self._stream, self._file = stream, file
        # bytes that are no UTF-8 become half characters, so that only their row is lost
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._place, self._ended = "", 0, False
        self.row = 0

    def _more(self) -> bool:
        data = self._stream.read(max(MIB, len(self._text) - self._place))
        self._ended = not data
        self._text = self._text[self._place :] + self._decoder.decode(data, self._ended)
        self._place = 0
        return not self._ended

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in _BLANK:
                    return self._text[self._place]
                self._place += 1
            if not self._more():
                return ""

    def _broken(self, problem: str) -> DataError:
        return DataError(
            f"{self._file.name}, row {self.row}: {problem}; what comes after it cannot be read",
            fix="correct the file there, or save it as JSON lines, of which each stands for itself",
        )

    def _refused(self, error: ValueError) -> object:
        try:
            _, self._place = _LENIENT.raw_decode(self._text, self._place)
        except (ValueError, RecursionError):
            raise self._broken(f"is not JSON: {error}") from None
        return RowFault("not_json", f"is not JSON: {error}")

    def _element(self) -> tuple[object, int]:
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended or isinstance(value, dict):
                    break  # a number at the end of what is read may go on
            except json.JSONDecodeError as error:
                if len(self._text) - self._place > MAX_ROW_BYTES:
                    raise self._broken(too_large().problem) from None
                if not self._more():
                    problem = error.msg if self._text.strip() else "the file ends"
                    raise self._broken(f"is not JSON: {problem}") from None
                continue
            except RecursionError:
                raise self._broken("is nested too deeply") from None
            except ValueError as error:
                return self._refused(error), 0
            self._more()
        raw, self._place = self._text[self._place : end], end
        if not raw.isascii() and _HALF.search(raw):
            return RowFault("not_utf8", "is not UTF-8 text"), 0
        return value, len(raw)

    def __iter__(self) -> Iterator[RawRow]:
        self._next()
        self._place += 1  # the opening bracket
        if self._next() == "]":
            return
        while True:
            self.row += 1
            value, size = self._element()
            try:
                row = value if isinstance(value, RowFault) else _as_row(value)
                yield self.row, row, size
            except RowFault as fault:
                yield self.row, fault, 0
            sign = self._next()
            if sign == "]":
                break
            if sign != ",":
                raise self._broken("is not followed by a comma or a closing bracket")
            self._place += 1
        self._place += 1
        if self._next():
            raise self._broken("is the last of the array, and more follows")


def _read_json(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    start = stream.peek(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        return iter(_Array(stream, file))
    row = _one_object(file) if start.startswith(b"{") and file.kind == "json" else None
    return iter([(1, row, MAX_ROW_BYTES)]) if row is not None else _read_lines(stream)


def _one_object(file: SourceFile) -> Row | None:
    """The row of a file that is one object, over many lines or on one; None for JSON lines.

    Raises:
        DataError: The object holds the rows in one of its keys, such as `{"data": [...]}`.
    """
    with open_bytes(file) as stream:
        text = stream.read(MAX_ROW_BYTES).decode("utf-8-sig", "replace").strip()
    try:
        value, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if end < len(text):
        return None
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows]
    held = [key for key in lists if isinstance(value[key][0], dict) and key not in CHAT_COLUMNS]
    if held and not CHAT_COLUMNS & set(lists):
        raise DataError(
            f"{file.name} is one JSON object that holds its rows in {held[0]!r}",
            fix=f"jq -c '.[\"{held[0]}\"][]' {file.name} > rows.jsonl   and name rows.jsonl",
        )
    return _as_row(value)


def _text_lines(stream: Stream, file: SourceFile) -> Iterator[str]:
    """Lines for the CSV reader, line ends kept; bytes that are no UTF-8 become half characters."""
    first = True
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{file.name} has a line of more than {MAX_ROW_BYTES // MIB} MiB",
                fix="check that it is CSV, and where a quote is not closed",
            )
        yield line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")
        first = False


def _delimiter(header: str, file: SourceFile) -> str:
    if named := _EXCEL_DELIMITER.fullmatch(header):
        return named[1]
    if ".tsv" in file.path.name.lower():
        return "\t"
    return max(",;\t", key=header.count)


def _header(cells: list[str], file: SourceFile) -> list[str]:
    names = [cell.strip() for cell in cells]
    if any(_HALF.search(name) for name in names):
        raise DataError(
            f"{file.name}, row 1: the header is not UTF-8 text",
            fix=to_utf8(file.name) or "save it as UTF-8",
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{file.name} has the column {twice[0]!r} twice", fix="give each column its own name"
        )
    return names


def _cells(cells: list[str], header: list[str]) -> Row:
    if len(cells) != len(header):
        raise RowFault("bad_cells", f"has {len(cells)} cells, the header has {len(header)}")
    if any(not cell.isascii() and _HALF.search(cell) for cell in cells):
        raise RowFault("not_utf8", "is not UTF-8 text")
    for name, cell in zip(header, cells, strict=True):
        if cell[:1] == " " and cell.endswith('"') and cell.lstrip(" ")[0] == '"':
            raise RowFault(
                "not_csv",
                f"is not CSV: a space stands before the quotes of {name!r}, which would"
                " then be part of its text",
            )
    return dict(zip(header, cells, strict=True))


def _csv_fault(error: csv.Error, first: int, last: int, file: SourceFile) -> RowFault:
    """The fault of a row that takes these lines.

    Raises:
        DataError: Nothing says where its quote should close, so all that follows stands in it.
    """
    hidden = last - first
    if not hidden:
        return RowFault("not_csv", f"is not CSV: {error}")
    if str(error).startswith(NOT_CLOSED):
        raise DataError(
            f"{file.name}, row {first}: has a quote that is never closed; the lines"
            f" {first + 1} to {last} after it cannot be read",
            fix=close_quote(file.name, first),
        )
    return RowFault("open_quote", f"has a quote that stays open to line {last}: {error}")


def _read_csv(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    start = stream.peek(65536).decode("utf-8-sig", "replace").splitlines()
    csv.field_size_limit(MAX_ROW_BYTES)
    text, first = _text_lines(stream, file), start[0] if start else ""
    skipped = _EXCEL_DELIMITER.fullmatch(first) is not None
    for _ in range(skipped):
        next(text)
    reader = csv.reader(text, delimiter=_delimiter(first, file), strict=True)
    try:
        header = _header(next(reader, []), file)
    except csv.Error as error:
        raise DataError(
            f"{file.name}, row 1: the header is not CSV: {error}", fix="correct the first line"
        ) from None
    while True:
        number = reader.line_num + skipped + 1
        try:
            cells = next(reader)
            if cells:
                yield number, _cells(cells, header), sum(map(len, cells))
        except StopIteration:
            return
        except csv.Error as error:
            yield number, _csv_fault(error, number, reader.line_num + skipped, file), 0
        except RowFault as fault:
            yield number, fault, 0


def _refuse_bomb(parquet: pq.ParquetFile, file: SourceFile) -> None:
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    unfolded = sum(group.total_byte_size for group in groups)
    if unfolded > RATIO_COUNTS_FROM and unfolded > MAX_RATIO * file.path.stat().st_size:
        raise DataError(
            f"{file.name} unfolds to more than {MAX_RATIO} times its size, as a bomb does",
            fix="look at it; save it with less compression if it is what it should be",
        )


def _read_parquet(file: SourceFile) -> Iterator[RawRow]:
    number = 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            _refuse_bomb(parquet, file)
            changes = changes_of(parquet.schema_arrow, file.name)
            for batch in parquet.iter_batches(PARQUET_ROWS_AT_ONCE, use_threads=False):
                for row in rows_of(batch, changes):
                    number += 1
                    yield number, row, batch.nbytes // batch.num_rows
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"{file.name} is not Parquet that can be read after row {number}: {first}",
            fix="copy or download it again",
        ) from None


def _read_arrow(file: SourceFile) -> Iterator[RawRow]:
    """Rows of an Arrow file, as `datasets` saves them."""
    number = 0
    try:
        with pa.memory_map(str(file.path)) as source:
            for batch, changes in _arrow_batches(source, file):
                for row in rows_of(batch, changes):
                    number += 1
                    yield number, row, batch.nbytes // batch.num_rows
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"{file.name} is not an Arrow file that can be read after row {number}: {first}",
            fix="copy or download it again",
        ) from None


def _arrow_batches(source: Any, file: SourceFile) -> Iterator[tuple[Any, dict[str, Change]]]:
    """Batches of at most `PARQUET_ROWS_AT_ONCE` rows."""
    is_file = source.read(len(ARROW)) == ARROW
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    changes = changes_of(reader.schema, file.name)
    whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in whole:
        for start in range(0, batch.num_rows, PARQUET_ROWS_AT_ONCE):
            yield batch.slice(start, PARQUET_ROWS_AT_ONCE), changes


def _read_text(stream: Stream, file: SourceFile) -> Iterator[RawRow]:
    """Paragraphs: lines up to a blank one."""
    first, last, size = 0, 0, 0
    parts: list[bytes] = []
    for number, line in lines(stream):
        if first and (number > last + 1 or isinstance(line, RowFault)):
            yield first, _paragraph(parts, size), size
            first, parts, size = 0, [], 0
        if isinstance(line, RowFault):
            yield number, line, 0
            continue
        first, last = first or number, number
        size += len(line)
        if size <= MAX_ROW_BYTES:
            parts.append(line)
    if first:
        yield first, _paragraph(parts, size), size


def _paragraph(parts: list[bytes], size: int) -> Row | RowFault:
    if size > MAX_ROW_BYTES:
        return too_large()
    try:
        return {"text": b"\n".join(p.rstrip(b"\r\n") for p in parts).decode("utf-8-sig").rstrip()}
    except UnicodeDecodeError as error:
        return RowFault("not_utf8", f"is not UTF-8 text (byte {error.start + 1})")


READERS: dict[str, Callable[[Stream, SourceFile], Iterator[RawRow]]] = {
    "jsonl": _read_json,
    "json": _read_json,
    "csv": _read_csv,
    "text": _read_text,
}


def raw_rows(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a file, each with its number, faults included.

    Raises:
        DataError: The file as a whole cannot be read, or not to its end.
    """
    if file.kind == "arrow":
        yield from _read_arrow(file)
        return
    with open_bytes(file) as stream:
        if stream.peek(4).startswith(PARQUET):
            yield from _read_parquet(file)
            return
        if file.kind == "parquet":
            raise DataError(f"{file.name} is not Parquet", fix="copy or download it again")
        number = 0
        with broken_file(file, lambda: number):
            for number, row, size in READERS[file.kind](stream, file):
                yield number, row, size
