"""The trained weights put into the base, stretch by stretch: never a whole file in memory.

A safetensors file keeps its header and the place of each tensor; only the values of adapted tensors
change. What the base was to the training, 4-bit or 8-bit, it is in the merged model too: those
weights are quantised and dequantised again, so that the merged model answers like the trained one.

Shapes: D rows out, C columns in, R rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from strixft.disk import sync
from strixft.errors import StageError

STRETCH_BYTES = 16 * 2**20
"""Read, changed and written at once."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """The merged rows of a weight, (D, C) in float32."""
        merged: Tensor = torch.addmm(weight, self.b[rows], self.a)
        if self.magnitude is None:
            return merged
        lengths: Tensor = merged.norm(dim=1)
        return merged.mul_((self.magnitude[rows] / lengths).unsqueeze(1))


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


def read_header(file: IO[bytes]) -> dict[str, dict[str, Any]]:
    """Names, types, shapes and places of a safetensors file's tensors, in the order of places."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda row: row[1]["data_offsets"]))


def _stretches(shape: list[int], element_bytes: int, whole: bool) -> Iterator[slice]:
    rows = shape[0]
    step = rows if whole else max(1, STRETCH_BYTES // max(1, element_bytes * shape[1]))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def as_stored(weight: Tensor, base: str) -> Tensor:
    """A weight as training saw it, in float32.

    Args:
        weight: Of the original checkpoint, (D, C).
        base: How the method keeps the base.
    """
    if base == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        found: Tensor = dequantize_4bit(packed, state).float()
        return found
    if base == "int8":
        from bitsandbytes.functional import int8_vectorwise_quant

        integers, scales, _ = int8_vectorwise_quant(weight.half())
        restored: Tensor = integers.float().mul_((scales / 127).unsqueeze(1))
        return restored
    return weight.float()


def _quantised(name: str, shape: list[int], base: str) -> bool:
    linear = len(shape) == 2 and name.endswith(".weight")
    return base != "native" and linear and not any(word in name for word in _NOT_QUANTISED)


def _merge_tensor(
    read: IO[bytes], write: IO[bytes], entry: dict[str, Any], update: Update | None, base: str
) -> None:
    dtype = DTYPES[entry["dtype"]]
    shape: list[int] = entry["shape"]
    whole = base != "native"  # the scales of a quantised weight are those of all its rows
    for rows in _stretches(shape, dtype.itemsize, whole):
        size = (rows.stop - rows.start) * shape[1] * dtype.itemsize
        stretch = torch.frombuffer(bytearray(read.read(size)), dtype=dtype).view(-1, shape[1])
        weight = as_stored(stretch, base)
        merged = (update.apply(weight, rows) if update else weight).to(dtype)
        write.write(merged.view(torch.uint8).numpy().data)


def _copy(read: IO[bytes], write: IO[bytes], size: int) -> None:
    while size:
        stretch = read.read(min(size, STRETCH_BYTES))
        if not stretch:
            raise StageError(f"{read.name} ends too early", fix="download the base model again")
        write.write(stretch)
        size -= len(stretch)


def merge_file(source: Path, target: Path, updates: Mapping[str, Update], base: str) -> set[str]:
    """Write a file of the base with the updates in it; returns the names that got one.

    Args:
        source: A safetensors file of the base.
        target: Where the merged one goes.
        updates: By the weight's name.
        base: How the method keeps the base: `native`, `nf4` or `int8`.
    """
    done = set()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        header = read_header(read)
        first = read.tell()
        read.seek(0)
        _copy(read, write, first)
        for name, entry in header.items():
            update, shape = updates.get(name), entry["shape"]
            if update is None and not _quantised(name, shape, base):
                start, end = entry["data_offsets"]
                _copy(read, write, end - start)
                continue
            _check(source, name, entry, update)
            _merge_tensor(read, write, entry, update, base if "lm_head" not in name else "native")
            done |= {name} if update else set()
    sync(target)
    return done


def _check(source: Path, name: str, entry: dict[str, Any], update: Update | None) -> None:
    if entry["dtype"] not in DTYPES:
        raise StageError(
            f"{name} in {source} is stored as {entry['dtype']}, which cannot be merged into",
            fix="model: the version of the base that is not quantised",
        )
    if update and [len(update.b), update.a.shape[1]] != entry["shape"]:
        raise StageError(
            f"{name} is {entry['shape']} in {source} and"
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
