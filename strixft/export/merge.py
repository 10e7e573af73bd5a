"""The trained weights put into the base, stretch by stretch: never a whole file in memory.

A safetensors file keeps its header and the place of each tensor; only the values of adapted tensors
change. What the base was to the training, 4-bit or 8-bit, it is in the merged model too: those
weights are quantised and dequantised again, so that the merged model answers like the trained one.

Shapes: D rows out, C columns in, R rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from strixft.disk import sync
from strixft.errors import StageError
from strixft.int8 import LARGEST
from strixft.loading.shards import DTYPES, Entry, Shard

STRETCH_BYTES = 4 * 2**20
"""Read, changed and written at once."""
MERGED = ("F32", "F16", "BF16")
"""Types of weights that an update can be added to."""
_PREFIX = "base_model.model."
_NOT_QUANTISED = ("embed", "lm_head")
AGAIN = "strixft run {0} --from train"


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one weight."""

    a: Tensor
    """(R, C), float32."""
    b: Tensor
    """(D, R), float32, scaled already."""
    magnitude: Tensor | None = None
    """Trained length of each row, (D,), where the adapter is DoRA's."""

    def to(self, device: str) -> Update:
        """The same on a device."""
        length = self.magnitude
        return Update(
            self.a.to(device), self.b.to(device), None if length is None else length.to(device)
        )

    def apply_(self, weight: Tensor, rows: slice) -> None:
        """Turn rows of the base's weight, (D, C) in float32, into the merged ones."""
        weight.addmm_(self.b[rows], self.a)
        if self.magnitude is not None:
            weight.mul_((self.magnitude[rows] / weight.norm(dim=1)).unsqueeze(1))


class _Scratch:
    """Memory for one stretch, used again: fresh memory costs more time than the product."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._floats = torch.empty(0)

    def bytes(self, size: int) -> Tensor:
        """Memory of this size, (size,)."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size]

    def floats(self, weight: Tensor) -> Tensor:
        """A weight in float32."""
        if len(self._floats) < weight.numel():
            self._floats = torch.empty(weight.numel())
        return self._floats[: weight.numel()].view_as(weight).copy_(weight)


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def read_updates(folder: Path) -> dict[str, Update]:
    """What a trained adapter adds to each weight, by the weight's name.

    Args:
        folder: Of the adapter, as PEFT writes it.

    Raises:
        StageError: It has tensors of another kind than LoRA's and DoRA's.
    """
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(folder)
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    found = {
        name.removeprefix(_PREFIX): tensor.float() for name, tensor in _tensors(folder).items()
    }
    updates = {}
    for name in [name for name in found if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = found.pop(name), found.pop(f"{module}.lora_B.weight")
        length = found.pop(f"{module}.lora_magnitude_vector", None)
        updates[f"{module}.weight"] = Update(a, b * scale, length)
    if found:
        raise StageError(
            f"the adapter in {folder} holds {next(iter(found))}, which is not known how to merge",
            fix=AGAIN.format("RECIPE"),
        )
    return updates


def _stretches(shape: tuple[int, ...], element_bytes: int, whole: bool) -> Iterator[slice]:
    rows = shape[0]
    step = rows if whole else max(1, STRETCH_BYTES // max(1, element_bytes * shape[1]))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Any]:
    """A weight as QLoRA stores it: packed values, and the scales with the shape."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return packed, state


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as LLM.int8 stores it: integers (D, C), and the largest value of each row (D,)."""
    from bitsandbytes.functional import int8_vectorwise_quant

    integers, scales, _ = int8_vectorwise_quant(weight.half())
    return integers, scales


def as_stored(weight: Tensor, base: str) -> Tensor:
    """A weight as training saw it, in float32.

    Args:
        weight: Of the original checkpoint, (D, C).
        base: How the method keeps the base.
    """
    if base == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(*quantise_nf4(weight)).float()
        return found
    if base == "int8":
        integers, scales = quantise_int8(weight)
        return integers.float().mul_((scales / LARGEST).unsqueeze(1))
    return weight.float()


def is_quantised(name: str, shape: tuple[int, ...], base: str) -> bool:
    """Whether the method keeps this weight quantised.

    Args:
        name: Of the weight in the checkpoint.
        shape: Its sides.
        base: How the method keeps the base.
    """
    linear = len(shape) == 2 and name.endswith(".weight")
    return base != "native" and linear and not any(word in name for word in _NOT_QUANTISED)


@dataclass(frozen=True, slots=True)
class _Files:
    """The file that is read, the one that is written, and memory for a stretch of them."""

    read: Shard
    write: IO[bytes]
    scratch: _Scratch

    def merge(self, entry: Entry, update: Update | None, base: str) -> None:
        """Read a tensor, change it, write it."""
        dtype, shape, start = DTYPES[entry.dtype], entry.shape, entry.start
        whole = base != "native"  # the scales of a quantised weight are those of all its rows
        for rows in _stretches(shape, dtype.itemsize, whole):
            stored = self._stretch(start, (rows.stop - rows.start) * shape[1] * dtype.itemsize)
            start += len(stored)
            weight = stored.view(dtype).view(-1, shape[1])
            merged = as_stored(weight, base) if whole else self.scratch.floats(weight)
            if update:
                update.apply_(merged, rows)
            weight.copy_(merged)
            self.write.write(stored.numpy().data)

    def copy(self, start: int, size: int) -> None:
        """Read and write bytes as they are."""
        for begin in range(start, start + size, STRETCH_BYTES):
            stretch = min(start + size - begin, STRETCH_BYTES)
            self.write.write(self._stretch(begin, stretch).numpy().data)

    def _stretch(self, start: int, size: int) -> Tensor:
        """Bytes of the file that is read, (size,)."""
        found = self.scratch.bytes(size)
        self.read.read(found, start)
        return found


def merge_file(source: Path, target: Path, updates: Mapping[str, Update], base: str) -> set[str]:
    """Write a file of the base with the updates in it; returns the names that got one.

    Args:
        source: A safetensors file of the base.
        target: Where the merged one goes.
        updates: By the weight's name.
        base: How the method keeps the base: `native`, `nf4` or `int8`.
    """
    done = set()
    with Shard(source) as shard, target.open("wb", buffering=0) as write:
        files = _Files(shard, write, _Scratch())
        files.copy(0, shard.first)
        for name, entry in shard.entries.items():
            update, quantised = updates.get(name), is_quantised(name, entry.shape, base)
            if update is None and not quantised:
                files.copy(entry.start, entry.size_bytes)
                continue
            _check(source, name, entry, update)
            files.merge(entry, update, base if quantised else "native")
            done |= {name} if update else set()
    sync(target)
    return done


def _check(source: Path, name: str, entry: Entry, update: Update | None) -> None:
    if entry.dtype not in MERGED:
        raise StageError(
            f"{name} in {source} is stored as {entry.dtype}, which cannot be merged into",
            fix="model: the version of the base that is not quantised",
        )
    if update and (len(update.b), update.a.shape[1]) != entry.shape:
        raise StageError(
            f"{name} is {list(entry.shape)} in {source} and"
            f" {[len(update.b), update.a.shape[1]]} in the adapter: it is another base model's",
            fix=AGAIN.format("RECIPE"),
        )


def merge(base_folder: Path, adapter: Path, target: Path, base: str) -> None:
    """Write a model folder: the base with a trained adapter in it.

    Args:
        base_folder: With `config.json`, the tokenizer and safetensors files.
        adapter: Folder of the adapter.
        target: An empty folder.
        base: How the method keeps the base.

    Raises:
        StageError: Adapter and base do not belong together.
    """
    updates = read_updates(adapter)
    files = sorted(base_folder.glob("*.safetensors"))
    done = {name for file in files for name in merge_file(file, target / file.name, updates, base)}
    missing = updates.keys() - done
    if missing:
        raise StageError(
            f"the base in {base_folder} has no {sorted(missing)[0]}, which the adapter changes",
            fix=AGAIN.format("RECIPE"),
        )
    for kind in ("*.json", "*.jinja", "*.model", "*.txt"):
        for file in base_folder.glob(kind):
            shutil.copyfile(file, target / file.name)
