"""Open a data file as a stream of bytes: unpacked on the way, and never without a bound.

A row may be as large as `MAX_ROW_BYTES`, and packed bytes may unpack to `MAX_RATIO` times their
number: a line that never ends and an archive that unpacks without end are refused, not read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from strixft.formats.faults import RowFault
from strixft.formats.messages import DataRow
from strixft.formats.sources import SourceFile, unreadable
from strixft.support.errors import DataError
from strixft.support.units import MIB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd  # the same module for older versions of Python


class RawRow(NamedTuple):
    """A row as it is in its file."""

    number: int
    row: DataRow | RowFault
    size: int
    """About how many bytes it takes."""


MAX_ROW_BYTES = 16 * MIB
"""Largest row. Its text would have about four million tokens."""

MAX_RATIO = 200
"""Text packs to about a tenth; what packs to less than a 200th is a bomb or one row repeated."""

RATIO_COUNTS_FROM = 64 * MIB

PARQUET, ARROW = b"PAR1", b"ARROW1"

UNPACKERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,  # refuses windows above 128 MiB
}
"""First bytes of a packed file → a file of what it holds."""

UNPACK = {".gz": "zcat", ".zst": "zstdcat"}
"""Ending of a packed file → the command that writes its text."""

BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError)
"""Errors of unpacking a damaged file."""

FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "unzip it, and name the file in it"),
    b"BZh": ("packed with bzip2", "unpack it: bunzip2"),
    b"\xfd7zXZ": ("packed with xz", "unpack it: unxz"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"%PDF": ("a PDF document", "save its text as .txt"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"version https://git-lfs": ("a pointer to a file that git-lfs keeps", "git lfs pull"),
    ARROW: ("an Arrow file", "give it the ending .arrow"),
    b"SQLite": ("an SQLite data base", "export its table as CSV"),
    b"\x89HDF": ("an HDF5 file", "save its text as JSON lines"),
    b"\x80\x04\x95": ("a pickle, which is never opened", "save its rows as JSON lines"),
}
"""First bytes of files that are not data here → what they are, and what to do."""


class _Bounded(io.RawIOBase):
    """Bytes of a packed file; stops where too little unpacks to too much."""

    def __init__(self, packed: IO[bytes], unpacked: Any, name: str) -> None:
        self._packed, self._unpacked, self._name = packed, unpacked, name
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._unpacked.readinto(buffer)
        self._num_bytes += count
        if self._num_bytes > max(RATIO_COUNTS_FROM, MAX_RATIO * self._packed.tell()):
            raise DataError(
                f"{self._name} unpacks to more than {MAX_RATIO} times its size, as a bomb does",
                fix="look at it; if it is what it should be, unpack it and name the unpacked file",
            )
        return count


def _refuse_foreign(head: bytes, name: str) -> None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = None
    if not head:
        found = "is empty (0 bytes)", "name a file with rows in it"
    elif known := next((known for first, known in FOREIGN.items() if head.startswith(first)), None):
        found = f"is {known[0]}", known[1].replace("FILE", name)
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        fix = "download it again; a page often says that one has to sign in first"
        found = "is a web page or XML, not data", fix
    elif b"\0" in head[:2]:
        fix = f"if it is text: iconv -f UTF-16LE -t UTF-8 {name} > NEW"
        found = "is UTF-16 text or not text at all", fix
    elif head[257:262] == b"ustar":
        found = "is a tar archive", "tar -xf it, and name the files in it"
    if found:
        raise DataError(f"{name} {found[0]}", fix=found[1])


@contextlib.contextmanager
def open_bytes(file: SourceFile) -> Iterator[io.BufferedReader[Any]]:
    """Open a data file, and unpack it if its first bytes say that it is packed.

    Raises:
        DataError: It cannot be opened, is empty, or is not data.
    """
    try:
        stream: io.BufferedReader[Any] = file.path.open("rb")
    except OSError as error:
        raise unreadable(file.name, error) from None
    with contextlib.ExitStack() as opened:
        opened.enter_context(stream)
        head = stream.peek(512)
        for signature, unpacker in UNPACKERS.items():
            if head.startswith(signature):
                unpacked = opened.enter_context(unpacker(stream))
                bounded = _Bounded(stream, unpacked, file.name)
                stream = opened.enter_context(io.BufferedReader(bounded, MIB))
                head = stream.peek(512)
                break
        _refuse_foreign(head[:512], file.name)
        yield stream


def too_large() -> RowFault:
    """Return the fault of a row that is larger than a row may be."""
    return RowFault("too_large", f"is larger than {MAX_ROW_BYTES // MIB} MiB")


def lines(stream: io.BufferedReader[Any]) -> Iterator[tuple[int, bytes | RowFault]]:
    """Yield lines with their numbers, from 1, without blank ones; a carriage return ends a line.

    A line that is too large is skipped without being held in memory.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            number += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(MIB)
            yield number, too_large()
            continue
        for piece in line.splitlines() if b"\r" in line else (line,):
            number += 1
            if not piece.isspace() and piece:
                yield number, piece


def _on(command: str, file: str) -> str:
    """Return a command on a file's text."""
    name = shlex.quote(file)
    tool = next((tool for ending, tool in UNPACK.items() if file.lower().endswith(ending)), None)
    return f"{tool} {name} | {command}" if tool else f"{command} {name}"


def close_quote(file: str, row: int) -> str:
    """Return the fix for a row of CSV that lacks a quote.

    >>> close_quote("a.csv.gz", 7)
    'zcat a.csv.gz | sed -n 7p   shows where the row begins; close its quote (one in a cell is "")'
    """
    shown = _on(f"sed -n {row}p", file)
    return f'{shown}   shows where the row begins; close its quote (one in a cell is "")'


def to_utf8(file: str) -> str | None:
    """Return the fix for text that is not UTF-8; None for Parquet, which is not text.

    >>> to_utf8("a.csv")
    'iconv -f WINDOWS-1252 -t UTF-8 a.csv > NEW.csv   makes it UTF-8 if it is Windows-1252'
    """
    endings = [ending for ending in Path(file.lower()).suffixes if ending not in UNPACK]
    ending = endings[-1] if endings else ""
    if ending == ".parquet":
        return None
    command = _on("iconv -f WINDOWS-1252 -t UTF-8", file)
    return f"{command} > NEW{ending}   makes it UTF-8 if it is Windows-1252"
