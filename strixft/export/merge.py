"""Merges the trained weights into the base, tensor by tensor: never a whole file in memory.

transformers' loading rules say which tensors of the files become which parameter. PEFT merges a
parameter. The same rules, followed backwards, give the places of its numbers in the files. Names,
files and types stay those of the base. A base that was 4-bit or 8-bit in training is so in the
merged model, too: its weights are quantised and dequantised again, so that the merged model answers
like the trained one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_quant,
    quantize_4bit,
)
from torch import Tensor, nn

from strixft.catalog.methods import METHODS
from strixft.guard.host import device_type, training_dtype
from strixft.model.adapter import saved_modules
from strixft.model.config import is_in_mxfp4
from strixft.model.files import INDEX, beside_weights, shard_paths
from strixft.model.groups import Group, groups_of
from strixft.model.load import shape_base
from strixft.model.mergeable import (
    BLOCKS,
    SCALES,
    adapted_parameters,
    as_whole_experts,
    groups_for,
    is_packed,
    own_names,
    quantised_parameters,
    replaced_parameters,
    without_tied,
)
from strixft.model.packed_experts import MX_BLOCK, packed, written_out
from strixft.model.quantised import LARGEST
from strixft.model.source import load_config
from strixft.model.stream import DTYPES, Entry, Shard
from strixft.recipe.schema import Recipe
from strixft.support.errors import StageError
from strixft.support.files import sync, write_text

ENDS = (BLOCKS, SCALES)

AGAIN = "strixft run RECIPE --from train"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Base:
    """The weights of the base, by their names in its files."""

    def __init__(self, shards: Sequence[Shard], config: Any, *, float32: bool = False) -> None:
        self._shards = {name: shard for shard in shards for name in shard.entries}
        self.entries: dict[str, Entry] = {n: s.entries[n] for n, s in self._shards.items()}
        self._whole: set[str] = set()
        self._float32, self._unpacked = float32, torch.bfloat16
        kind = getattr(config, "dtype", None)
        if isinstance(kind, torch.dtype) and kind.itemsize > 1:
            self._unpacked = kind

    def write_experts_out(self) -> None:
        """Hold experts in bf16 that the files have in MXFP4."""
        stored, self.entries = self.entries, as_whole_experts(self.entries)
        self._whole = self.entries.keys() - stored.keys()
        for name in self._whole:
            self._shards[name] = self._shards[f"{name}{BLOCKS}"]

    def shard(self, name: str) -> Shard:
        """Return the file with a weight."""
        return self._shards[name]

    def is_packed(self, name: str) -> bool:
        """Return whether bitsandbytes has packed a weight."""
        return is_packed(name, self.entries[name])

    def written(self, name: str) -> tuple[torch.dtype, Sequence[int]]:
        """Return the type and the shape in which a weight is written."""
        entry = self.entries[name]
        dtype = self._unpacked if self.is_packed(name) else DTYPES[entry.dtype]
        if self._float32 and dtype.is_floating_point:
            dtype = torch.float32
        states = [n for n in self.entries if n.startswith(f"{name}.quant_state.")]
        if not states:
            return dtype, entry.shape
        return dtype, json.loads(self._stored(states[0]).numpy().tobytes())["shape"]

    def _stored(self, name: str) -> Tensor:
        return self._shards[name].tensor(name)

    def read(self, name: str) -> Tensor:
        """Read a weight; unpack one that bitsandbytes has packed to float32."""
        if name in self._whole:
            return self._written_out(name)
        stored = self._stored(name)
        if not self.is_packed(name):
            return stored
        if stored.dtype is torch.int8:
            return _from_int8(stored, self._stored(name.removesuffix("weight") + "SCB"))
        beside = {n: self._stored(n) for n in self.entries if n.startswith(f"{name}.")}
        found: Tensor = dequantize_4bit(stored, QuantState.from_dict(beside, torch.device("cpu")))
        return found.float()

    def _written_out(self, name: str) -> Tensor:
        """Return experts, (E, C, D), that the files have as (E, D, C) in MXFP4."""
        blocks, scales = (self._shards[f"{name}{end}"].tensor(f"{name}{end}") for end in ENDS)
        shape = torch.Size((*blocks.shape[:2], scales.shape[2] * MX_BLOCK))
        parts = [blocks.flatten(1), scales.flatten(1)]
        return written_out(parts, shape, torch.bfloat16, "mxfp4").mT

    def unchanged(self, name: str) -> Iterator[Tensor]:
        """Yield a weight that is not merged into, piece by piece."""
        if self.is_packed(name) or name in self._whole or self._float32:
            yield self.read(name).to(self.written(name)[0])
        else:
            yield from self._shards[name].pieces(name)


class _File:
    """A safetensors file whose tensors, given by type and shape, are filled in any order."""

    def __init__(self, path: Path, rows: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts, end = {}, 0
        for name, (dtype, shape) in rows.items():
            self._starts[name], start = end, end
            end += math.prod(shape) * dtype.itemsize
            row = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            header[name] = row
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path, self._first, self._file = path, 8 + len(text), path.open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._first + end)

    def write(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor to its place, piece by piece."""
        start = self._first + self._starts[name]
        for part in parts:
            view = part.contiguous().view(-1).view(torch.uint8).numpy().data
            while view:
                done = os.pwrite(self._file.fileno(), view, start)
                view, start = view[done:], start + done

    def close(self) -> None:
        """Write the file to the disk."""
        self._file.close()
        sync(self.path)


def _from_int8(integers: Tensor, scales: Tensor) -> Tensor:
    """Return the weight, (D, C), of integers, (D, C), and the scale of each row, (D)."""
    return integers.float().mul_((scales.float() / LARGEST).unsqueeze(1))


def as_stored(weight: Tensor, base: str) -> Tensor:
    """Return a weight as training saw it, (D, C) or (E, D, C), in float32.

    Args:
        weight: Weight of the original checkpoint, (D, C) or those of E experts, on the device and
            in the type of training.
        base: Storage of the base in training: `native`, `nf4` or `int8`.
    """
    if weight.ndim == 3:  # experts
        return written_out([*packed(weight).values()], weight.shape, torch.float32)
    if base == "nf4":
        stored = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        found: Tensor = dequantize_4bit(*stored)
        return found.float()
    if base == "int8":
        return _from_int8(*int8_vectorwise_quant(weight.half())[:2])
    return weight.float()


def load_adapted(config: Any, adapter: Path, device: str) -> nn.Module:
    """Return the base on `meta` with a trained adapter, as PEFT writes it, on a device.

    Raises:
        StageError: The adapter is another model's, incomplete, or holds more than can be merged.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights

    def refused(problem: str) -> StageError:
        return StageError(f"the adapter in {adapter} {problem}", fix=AGAIN)

    state = load_peft_weights(str(adapter), device="cpu")
    settings, base = (
        PeftConfig.from_pretrained(adapter),
        shape_base(config, METHODS["lora"], torch.float32),
    )
    with torch.device("meta"):
        model: nn.Module = PeftModel(base, settings)
    whole = {f"base_model.model.{name}" for name in replaced_parameters(model)}
    if strange := [name for name in state if ".lora_" not in name and name not in whole]:
        raise refused(f"holds {strange[0]}, which cannot be merged")
    for _, module in saved_modules(model):
        module.to_empty(device=device)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.adapter_layer_names:
                getattr(layer, name).to_empty(device=device)
    try:
        result = set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise refused(f"is for another base model: {' '.join(str(error).split())}") from error
    ours = (".lora_", ".modules_to_save.")
    missing = [name for name in result.missing_keys if any(part in name for part in ours)]
    missing += result.unexpected_keys
    if missing:
        raise refused(f"and the base do not belong together: {missing[0]}")
    return model


class _Merger:
    """Turns parameters of the base into those of the merged model."""

    def __init__(self, recipe: Recipe, config: Any, adapter: Path) -> None:
        self._device, self._dtype = device_type(), training_dtype()
        self._storage = METHODS[recipe.method].base
        trained = load_adapted(config, adapter, self._device)
        self._adapted, self._replaced = adapted_parameters(trained), replaced_parameters(trained)
        self._quantised = quantised_parameters(config, self._storage, self._dtype)
        self.changed: set[str] = self._adapted.keys() | self._replaced.keys() | self._quantised
        """Names of the parameters that differ from the base's files."""
        self.shape = shape_base(config, METHODS["lora"], torch.float32)

    def changes_experts(self, entries: Mapping[str, Entry]) -> bool:
        """Return whether experts change that the files have in MXFP4."""
        return any(f"{name}{BLOCKS}" in entries for name in self.changed)

    @torch.no_grad()
    def _merged(self, name: str, weight: Tensor, *, is_packed: bool) -> Tensor:
        """Return a parameter of the merged model, in float32 on the device.

        Args:
            name: Name of the parameter.
            weight: The parameter in the base's files.
            is_packed: True if the files hold it packed: then it is the weight that training saw.
        """
        if name in self._replaced:
            return self._replaced[name]
        if name in self._quantised and not is_packed:
            weight = as_stored(weight.to(self._device, self._dtype), self._storage)
        weight = weight.to(self._device, torch.float32)
        if name not in self._adapted:
            return weight
        layer, owner, leaf = self._adapted[name]
        empty = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))
        layer.merge()  # type: ignore[operator]
        found: Tensor = getattr(owner, leaf).data
        setattr(owner, leaf, empty)
        return found

    def merge(self, group: Group, base: _Base) -> dict[str, Tensor]:
        """Return the tensors of a group for the files of the merged model."""
        is_packed = base.is_packed(group.names[0])
        tensors = {name: base.read(name) for name in group.names}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        made = group.convert(tensors, self.shape)
        del tensors
        if group.transform is None:
            [name], [(target, weight)] = group.names, made.items()
            merged = self._merged(target, weight, is_packed=is_packed)
            return {name: merged.to(base.written(name)[0]).cpu()}
        flat = torch.empty(sum(math.prod(shape) for shape in shapes.values()))
        for target, places in _places(group, shapes, self.shape).items():
            merged = self._merged(target, made.pop(target), is_packed=is_packed)
            flat[places.flatten().long()] = merged.flatten().cpu()
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        return {
            name: part.view(shape).to(base.written(name)[0])
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }


def _places(group: Group, shapes: Mapping[str, Sequence[int]], model: Any) -> dict[str, Tensor]:
    """Return the index of each number of a group's parameters in its concatenated tensors.

    Raises:
        StageError: Loading does more than move numbers, so it cannot be undone.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    kind, start, numbered = torch.int32 if total < 2**31 else torch.int64, 0, {}
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        numbered[name], start = torch.arange(start, end, dtype=kind).view(*shape), end
    found = group.convert(numbered, model)
    seen = torch.zeros(total, dtype=torch.bool)
    for places in found.values():
        seen[places.flatten().long()] = True
    if not seen.all() or sum(places.numel() for places in found.values()) != total:
        raise StageError(
            f"{group.target} is computed from {group.names[0]}, which cannot be undone",
            fix="--to gguf-lora   (the adapter alone)",
        )
    return found


def merge(
    recipe: Recipe, base_folder: Path, adapter: Path, target: Path, *, float32: bool = False
) -> None:
    """Write a model folder: the base as training saw it, merged with a trained adapter.

    Args:
        recipe: Recipe of the run.
        base_folder: Folder with `config.json`, the tokenizer and safetensors files.
        adapter: Folder of the adapter.
        target: An empty folder.
        float32: Write all weights in float32, else in the types of the base.

    Raises:
        StageError: Adapter and base do not belong together.
    """
    config = load_config(recipe)
    merger = _Merger(recipe, config, adapter)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(Shard(path)) for path in shard_paths(base_folder)]
        base = _Base(shards, config, float32=float32)
        is_packed_again = not merger.changes_experts(base.entries)
        if not is_packed_again:
            base.write_experts_out()
        names = own_names(base.entries)
        wanted = without_tied(merger.changed, merger.shape, base.entries)
        groups = groups_for(merger.shape, base.entries, wanted)
        files: dict[str, _File] = {}
        for shard in shards:
            rows = {name: base.written(name) for name in names if base.shard(name) is shard}
            file = _File(target / shard.path.name, rows)
            stack.callback(file.close)
            files |= dict.fromkeys(rows, file)
        for group in groups:
            for name, tensor in merger.merge(group, base).items():
                files[name].write(name, [tensor])
        changed = {name for group in groups for name in group.names}
        for name in names:
            if name not in changed:
                files[name].write(name, base.unchanged(name))
    as_stored = is_packed_again and is_in_mxfp4(config)
    copy_beside(base_folder, target, float32=float32, as_stored=as_stored)
    if len(shards) > 1:
        _write_index(target, [target / shard.path.name for shard in shards])


def pass_through(recipe: Recipe, base_folder: Path, target: Path) -> None:
    """Add the tensors that training did not load, such as a tower, to a model that it wrote."""
    config = load_config(recipe)
    shape = shape_base(config, METHODS["full"], torch.float32)
    with contextlib.ExitStack() as stack:
        base = _Base([stack.enter_context(Shard(p)) for p in shard_paths(base_folder)], config)
        base.write_experts_out()
        loaded = {name for group in groups_of(shape, base.entries) for name in group.names}
        rest = {name: base.written(name) for name in base.entries if name not in loaded}
        if not rest:
            return
        file = _File(target / "model-not-trained.safetensors", rest)
        for name in rest:
            file.write(name, base.unchanged(name))
        file.close()
    _write_index(target, [*shard_paths(target), file.path])


def _write_index(folder: Path, paths: Sequence[Path]) -> None:
    places: dict[str, str] = {}
    for path in paths:
        with Shard(path) as shard:
            places |= dict.fromkeys(shard.entries, path.name)
    index = {"metadata": {"total_size": sum(p.stat().st_size for p in paths)}, "weight_map": places}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_beside(
    base_folder: Path, target: Path, *, float32: bool = False, as_stored: bool = False
) -> None:
    """Copy the files beside the weights: settings, tokenizer, templates, the model's own code.

    Args:
        base_folder: Folder of the base.
        target: Folder of the merged model.
        float32: True if its weights are float32.
        as_stored: Quantised weights of the base are so in the merged model.
    """
    for file in beside_weights(base_folder):
        place = target / file.relative_to(base_folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    packed = None if as_stored else config.pop("quantization_config", None)
    if float32:
        config.pop("torch_dtype", None)
        config["dtype"] = "float32"
    if packed or float32:
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
