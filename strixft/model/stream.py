"""Safetensors files, read piece by piece, straight to a device and past the page cache.

Where device and host share memory, a file that is mapped and copied to the device lies there twice,
and the kernel takes its pages back one by one. So files are read into a buffer that is used again,
and what was read leaves the page cache at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strixft.support.errors import StageError
from strixft.support.progress import progress_bar

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Names of types in a file's header."""

PIECE_BYTES = 16 * 2**20
"""Read at once. A device gets its tensors through one such piece of host memory per thread."""

Checksums = Mapping[str, int]
"""CRC-32 of the bytes of each tensor."""

_AGAIN = "download the base model again"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    dtype: str
    """One of `DTYPES`, or a type that strixft does not read."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    size_bytes: int


class Shard(contextlib.AbstractContextManager["Shard"]):
    """One safetensors file, open for reading, from any number of threads.

    Raises:
        StageError: It is truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_header(path)
        """The tensors by name, in the order of their offsets."""
        self._file = path.open("rb", buffering=0)

    def __exit__(self, *_: object) -> None:
        self._drop(0, 0)  # what was read ahead, and pages that two tensors share
        self._file.close()

    def read(self, buffer: Tensor, start: int) -> None:
        """Fill a host buffer, uint8 (bytes,), from an offset of the file.

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
        """Drop a stretch from the page cache; 0 bytes mean up to the end."""
        os.posix_fadvise(self._file.fileno(), start, size_bytes, os.POSIX_FADV_DONTNEED)

    def pieces(self, name: str, whole: Tensor | None = None) -> Iterator[Tensor]:
        """Yield a tensor's bytes, uint8 (at most `PIECE_BYTES`,), one piece after the other.

        Args:
            name: The tensor.
            whole: Host memory for all of it, uint8 (bytes,); else the next piece overwrites one.
        """
        entry = self.entries[name]
        if whole is None:
            buffer = torch.empty(min(PIECE_BYTES, entry.size_bytes), dtype=torch.uint8)
        for start in range(0, entry.size_bytes, PIECE_BYTES):
            end = min(start + PIECE_BYTES, entry.size_bytes)
            piece = buffer[: end - start] if whole is None else whole[start:end]
            self.read(piece, entry.start + start)
            yield piece

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the host, as it is stored."""
        entry = self.entries[name]
        stored = torch.empty(entry.size_bytes, dtype=torch.uint8)
        self.read(stored, entry.start)
        return stored.view(DTYPES[entry.dtype]).view(entry.shape)


def _read_header(path: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks offsets and sizes; touches no tensor
            pass
    except SafetensorError as error:
        raise StageError(
            f"{path} is truncated or not a safetensors file: {error}", fix=_AGAIN
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    entries = {}
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = row["data_offsets"]
        entries[name] = Entry(row["dtype"], tuple(row["shape"]), 8 + size + start, end - start)
    return entries


def checksums_of(path: Path) -> dict[str, int]:
    """Return the CRC-32 of each tensor of a file."""
    with Shard(path) as shard:
        found = dict.fromkeys(shard.entries, 0)
        for name in found:
            for piece in shard.pieces(name):
                found[name] = zlib.crc32(piece.numpy().data, found[name])
    return found


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a file with the methods of safetensors' slices, which transformers calls."""

    shard: Shard
    name: str
    device: torch.device
    tell: Callable[[int], None]
    """Called with the number of bytes that were read."""
    checksums: Checksums | None

    def get_dtype(self) -> str:
        """Return the type's name in the file's header."""
        return self.shard.entries[self.name].dtype

    def get_shape(self) -> list[int]:
        """Return the sizes."""
        return list(self.shard.entries[self.name].shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the tensor on its device: all of it for `...`, else the part of that index.

        Raises:
            StageError: The file ends before, or the checksum differs.
        """
        entry, start, checksum = self.shard.entries[self.name], 0, 0
        whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=self.device)
        target, on_host = whole.view(-1).view(torch.uint8), self.device.type == "cpu"
        for piece in self.shard.pieces(self.name, target if on_host else None):
            if not on_host:
                target[start : start + len(piece)].copy_(piece)
            if self.checksums is not None:
                checksum = zlib.crc32(piece.numpy().data, checksum)
            start += len(piece)
            self.tell(len(piece))
        if self.checksums is not None and self.checksums.get(self.name) != checksum:
            raise StageError(
                f"{self.name} in {self.shard.path} is not what was written",
                fix="run the same command again",
            )
        return whole if index is ... else whole[index]


@contextlib.contextmanager
def streaming(
    paths: Sequence[Path], device: str, checksums: Checksums | None = None
) -> Iterator[dict[str, StreamedTensor]]:
    """Lend all tensors of some files, read when they are asked for, with a progress bar.

    Args:
        paths: Safetensors files.
        device: Where the tensors go.
        checksums: Expected checksums; None to skip the check.

    Raises:
        StageError: A file is truncated.
    """
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(Shard(path)) for path in paths]
        total = sum(entry.size_bytes for shard in shards for entry in shard.entries.values())
        options = {"unit": "iB", "unit_scale": True, "unit_divisor": 1024}  # so: 3.2GiB/s
        bar = stack.enter_context(progress_bar(total=total, desc="weights", **options))
        lock = threading.Lock()

        def tell(size_bytes: int) -> None:
            with lock:
                bar.update(size_bytes)

        yield {
            name: StreamedTensor(shard, name, torch.device(device), tell, checksums)
            for shard in shards
            for name in shard.entries
        }
