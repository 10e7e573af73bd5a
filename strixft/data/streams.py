"""Open a data file as a stream of bytes: unpacked on the way, and never without a bound.

A row may be as large as `MAX_ROW_BYTES`, and packed bytes may unfold to `MAX_RATIO` times their
number: a line that never ends and an archive that unfolds without end are refused, not read.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from strixft.formats.faults import RowFault
from strixft.formats.sources import SourceFile
from strixft.support.errors import DataError
from strixft.support.units import MIB

if TYPE_CHECKING:
    Stream = io.BufferedReader[Any]
else:
    Stream = io.BufferedReader


MAX_ROW_BYTES = 16 * MIB
"""Largest row. Its text would have about four million tokens."""

MAX_RATIO = 200
"""Text packs to about a tenth; what packs to less than a 200th is a bomb or one row repeated."""

RATIO_COUNTS_FROM = 64 * MIB

MAX_WINDOW_BYTES = 128 * MIB
"""What an unpacker of zst may keep in memory."""

_BUFFER_BYTES = MIB


GZIP, ZSTD, PARQUET, ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"

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
"""First bytes of files that are no data here → what they are, and what to do."""


def _zstandard() -> Any:
    """The library for zst files, which only those who have such files need."""
    return importlib.import_module("zstandard")


def _broken() -> tuple[type[Exception], ...]:
    """What unpacking a damaged file raises."""
    zst = (_zstandard().ZstdError,) if "zstandard" in sys.modules else ()
    return (EOFError, zlib.error, gzip.BadGzipFile, *zst)


class _Unpacked(io.RawIOBase):
    """Bytes of a packed file; stops where too little unfolds to too much."""

    def __init__(self, packed: IO[bytes], inner: Any, name: str, whole: Callable[[], bool]) -> None:
        self._packed, self._inner, self._name, self._whole = packed, inner, name, whole
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._inner.readinto(buffer)
        if count == 0 and not self._whole():
            raise EOFError("the packed data end in the middle")
        self._num_bytes += count
        read = max(1, self._packed.tell())
        if self._num_bytes > RATIO_COUNTS_FROM and self._num_bytes > MAX_RATIO * read:
            raise DataError(
                f"{self._name} unfolds to more than {MAX_RATIO} times its size, as a bomb does",
                fix="look at it; if it is what it should be, unpack it and name the unpacked file",
            )
        return count

    def close(self) -> None:
        self._inner.close()
        self._packed.close()
        super().close()


def _ends_whole(path: Path) -> bool:
    """A zst file ends where a frame ends: the unpacker itself says nothing if it does not.

    Walks over the blocks of each frame (RFC 8878, section 3.1.1) and unpacks none.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        while start := file.read(18):
            if start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:  # a frame to skip
                file.seek(int.from_bytes(start[4:8], "little") + 8 - len(start), os.SEEK_CUR)
                continue
            file.seek(_zstandard().frame_header_size(start) - len(start), os.SEEK_CUR)
            last = False
            while not last:
                block = int.from_bytes(header := file.read(3), "little")
                last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
                file.seek(1 if kind == 1 else length, os.SEEK_CUR)
                if len(header) < 3 or file.tell() > size:
                    return False
            file.seek(
                4 if _zstandard().get_frame_parameters(start).has_checksum else 0, os.SEEK_CUR
            )
            if file.tell() > size:
                return False
    return True


def _refuse_foreign(head: bytes, name: str) -> None:
    if not head:
        raise DataError(f"{name} is empty (0 bytes)", fix="name a file with rows in it")
    for signature, (what, fix) in FOREIGN.items():
        if head.startswith(signature):
            raise DataError(f"{name} is {what}", fix=fix.replace("FILE", name))
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(
            f"{name} is a web page or XML, not data",
            fix="download it again; a page often says that one has to sign in first",
        )
    if b"\0" in head[:2]:
        raise DataError(
            f"{name} is UTF-16 text or no text at all",
            fix=f"if it is text: iconv -f UTF-16LE -t UTF-8 {name} > NEW",
        )
    if head[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive", fix="tar -xf it, and name the files in it")


def open_bytes(file: SourceFile) -> Stream:
    """A data file's bytes, unpacked if its first bytes say that it is packed.

    Raises:
        DataError: It cannot be read, is empty, or is something else than data.
    """
    try:
        packed = file.path.open("rb")
        head = packed.read(512)
        packed.seek(0)
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be read: {error.strerror}",
            fix=f"ls -l {file.name}   shows whose it is",
        ) from None
    stream = _unpacked(packed, head, file)
    try:
        with broken_file(file, lambda: 0):
            _refuse_foreign(stream.peek(512)[:512], file.name)
    except DataError:
        stream.close()
        raise
    return stream


def _unpacked(packed: Stream, head: bytes, file: SourceFile) -> Stream:
    inner: Any
    if head.startswith(GZIP):
        inner = _Unpacked(packed, gzip.GzipFile(fileobj=packed), file.name, lambda: True)
    elif head.startswith(ZSTD):
        unpacker = _zstandard().ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        reader = unpacker.stream_reader(packed, read_across_frames=True)
        inner = _Unpacked(packed, reader, file.name, lambda: _ends_whole(file.path))
    else:
        return packed
    return io.BufferedReader(inner, _BUFFER_BYTES)


@contextlib.contextmanager
def broken_file(file: SourceFile, row: Any) -> Iterator[None]:
    """Turns what unpacking and reading may raise into a `DataError`.

    Args:
        file: For the text.
        row: Called for the number of the last row that could be read.
    """
    try:
        yield
    except _broken() as error:
        raise DataError(
            f"{file.name} breaks off after row {row()}: {str(error) or type(error).__name__}",
            fix="copy or download it again; gzip -t or zstd -t   tells whether it is whole",
        ) from None
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be read after row {row()}: {error.strerror or error}",
            fix="check the disk and the file",
        ) from None


def too_large() -> RowFault:
    """The fault of a row that is larger than a row may be."""
    return RowFault("too_large", f"is larger than {MAX_ROW_BYTES // MIB} MiB")


def lines(stream: Stream) -> Iterator[tuple[int, bytes | RowFault]]:
    """Lines with their numbers, from 1, blank ones left out; a carriage return ends a line too.

    A line that is too large is skipped without being held.
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


UNPACK = {".gz": "zcat", ".zst": "zstdcat"}
"""Ending of a packed file → what writes its text."""


def _on(command: str, file: str) -> str:
    """A command on a file's text."""
    name = shlex.quote(file)
    tool = next((tool for ending, tool in UNPACK.items() if file.lower().endswith(ending)), None)
    return f"{tool} {name} | {command}" if tool else f"{command} {name}"


def close_quote(file: str, row: int) -> str:
    """The fix for a row of CSV that has a quote too few.

    >>> close_quote("a.csv.gz", 7)
    'zcat a.csv.gz | sed -n 7p   shows where the row begins; close its quote (one in a cell is "")'
    """
    shown = _on(f"sed -n {row}p", file)
    return f'{shown}   shows where the row begins; close its quote (one in a cell is "")'


def to_utf8(file: str) -> str | None:
    """The fix for text that is not UTF-8; None for Parquet, which is no text.

    >>> to_utf8("a.csv")
    'iconv -f WINDOWS-1252 -t UTF-8 a.csv > NEW.csv   makes it UTF-8 if it is Windows-1252'
    """
    endings = [ending for ending in Path(file.lower()).suffixes if ending not in UNPACK]
    ending = endings[-1] if endings else ""
    if ending == ".parquet":
        return None
    command = _on("iconv -f WINDOWS-1252 -t UTF-8", file)
    return f"{command} > NEW{ending}   makes it UTF-8 if it is Windows-1252"
