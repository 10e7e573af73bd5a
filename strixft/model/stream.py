"""Safetensors files, read piece by piece straight to a device, past the page cache."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from strixft.support.errors import StageError
from strixft.support.progress import progress_bar

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


PIECE_BYTES = 16 * 2**20
"""Read at once. A device gets its tensors through one such piece of host memory per thread."""

Sums = Mapping[str, int]
"""CRC-32 of tensors' bytes, by name."""


class DamagedError(StageError):
    """A tensor is not what was written."""


class StreamedTensor:
    """A tensor of a file, as transformers takes it from `safetensors`' own reader.

    Args:
        reader: Reads it.
        shard: Its file.
        name: Of the tensor.
    """

    def __init__(self, reader: Reader, shard: Shard, name: str) -> None:
        self._reader, self._shard, self._name = reader, shard, name
        self.entry: Entry = shard.entries[name]

    def get_dtype(self) -> str:
        """The type's name in the file's header."""
        return self.entry.dtype

    def get_shape(self) -> list[int]:
        """The sizes."""
        return list(self.entry.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor on its device; with `...` all of it, else the part of that index."""
        whole = self._reader.read(self._shard, self._name)
        return whole if index is ... else whole[index]


class Reader:
    """Reads tensors to a device, from any number of threads.

    Args:
        device: Where they go.
        bar: Counts bytes.
        sums: What the bytes should add up to; not checked where it is None.
    """

    def __init__(self, device: str, bar: Any, sums: Sums | None) -> None:
        self._device, self._bar, self._sums = torch.device(device), bar, sums
        self._of_thread, self._lock = threading.local(), threading.Lock()

    def read(self, shard: Shard, name: str) -> Tensor:
        """A tensor on the device.

        Raises:
            StageError: Its file ends before.
            DamagedError: It does not add up.
        """
        entry, sum_ = shard.entries[name], 0
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=self._device)
        flat = tensor.view(-1).view(torch.uint8)
        for start in range(0, len(flat), PIECE_BYTES):
            target = flat[start : start + PIECE_BYTES]
            sum_ = self._read_piece(shard, entry.start + start, target, sum_)
        if self._sums is not None and self._sums.get(name) != sum_:
            raise DamagedError(
                f"{name} in {shard.path} is not what was written", fix="type the same command again"
            )
        return tensor

    def _read_piece(self, shard: Shard, start: int, target: Tensor, sum_: int) -> int:
        """Read a piece; returns the sum with it."""
        on_host = target.device.type == "cpu"
        piece = target if on_host else self._staging()[: len(target)]
        shard.read(piece, start)
        if not on_host:
            target.copy_(piece)
        with self._lock:
            self._bar.update(len(target))
        return sum_ if self._sums is None else zlib.crc32(piece.numpy().data, sum_)

    def _staging(self) -> Tensor:
        if not hasattr(self._of_thread, "piece"):
            self._of_thread.piece = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        piece: Tensor = self._of_thread.piece
        return piece


@contextlib.contextmanager
def streaming(
    paths: Sequence[Path], device: str, sums: Sums | None = None
) -> Iterator[dict[str, StreamedTensor]]:
    """All tensors of some files, read when they are asked for, with a progress bar.

    Args:
        paths: Safetensors files.
        device: Where the tensors go.
        sums: What the bytes of each tensor should add up to.

    Raises:
        StageError: A file is not whole, or a tensor's type is not known.
    """
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(Shard(path)) for path in paths]
        total = sum(entry.size_bytes for shard in shards for entry in shard.entries.values())
        options = {"unit": "iB", "unit_scale": True, "unit_divisor": 1024}  # so: 3.2GiB/s
        bar = stack.enter_context(progress_bar(total=total, desc="weights", **options))
        reader = Reader(device, bar, sums)
        yield {
            name: StreamedTensor(reader, shard, name) for shard in shards for name in shard.entries
        }


def sums_of(path: Path) -> dict[str, int]:
    """CRC-32 of each tensor of a file, by name."""
    found, piece = {}, torch.empty(PIECE_BYTES, dtype=torch.uint8)
    with Shard(path) as shard:
        for name, entry in shard.entries.items():
            found[name] = 0
            for start in range(0, entry.size_bytes, PIECE_BYTES):
                part = piece[: min(PIECE_BYTES, entry.size_bytes - start)]
                shard.read(part, entry.start + start)
                found[name] = zlib.crc32(part.numpy().data, found[name])
    return found
