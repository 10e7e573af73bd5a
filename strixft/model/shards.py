"""Safetensors files, read in stretches that do not stay in the page cache.

A file that is mapped into memory and copied to the device is there twice on a machine whose device
uses the same memory, and its pages are taken back one by one. So files are read, into memory that
is used again, and what was read is dropped from the page cache at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from strixft.support.errors import StageError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in a file's header."""

_AGAIN = "download the base model again"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    dtype: str
    """One of `DTYPES`, or one that is not known here."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte, counted from the begin of the file."""
    size_bytes: int


class Shard:
    """One safetensors file, open for reading.

    Args:
        path: The file.

    Raises:
        StageError: It is none, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.first, self.entries = _read_header(path)
        """Where the header ends, and the tensors by name, in the order of their places."""
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop(0, 0)  # what was read ahead, and pages that two tensors share
        self._file.close()

    def read(self, buffer: Tensor, start: int) -> None:
        """Fill a buffer on the host, (bytes,) in uint8, from a place of the file.

        Safe to call from several threads.

        Raises:
            StageError: The file ends before.
        """
        view, done = buffer.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if not count:
                raise StageError(f"{self.path} ends too early", fix=_AGAIN)
            done += count
        self._drop(start, done)

    def _drop(self, start: int, size_bytes: int) -> None:
        """Take a stretch out of the page cache; 0 bytes are all up to the end."""
        os.posix_fadvise(self._file.fileno(), start, size_bytes, os.POSIX_FADV_DONTNEED)


def _read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks places and sizes; touches no tensor
            pass
    except SafetensorError as error:
        raise StageError(f"{path} is no whole safetensors file: {error}", fix=_AGAIN) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    first = 8 + size
    rows = sorted(header.items(), key=lambda row: row[1]["data_offsets"])
    return first, {name: _entry(first, row) for name, row in rows}


def _entry(first: int, row: dict[str, list[int]]) -> Entry:
    start, end = row["data_offsets"]
    return Entry(str(row["dtype"]), tuple(row["shape"]), first + start, end - start)
