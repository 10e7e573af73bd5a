"""The parameters that a merge changes, and whether it can change them through the files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from strixft.catalog.methods import METHODS
from strixft.model.adapter import attach_adapter, base_of, saved_modules
from strixft.model.architecture import architecture_of
from strixft.model.config import first_lines
from strixft.model.files import model_folder, shard_paths
from strixft.model.groups import Group, groups_of
from strixft.model.load import shape_base
from strixft.model.packed_experts import MX_BLOCK, packed_in
from strixft.model.source import load_config, model_source
from strixft.model.stream import Entry, Shard
from strixft.recipe.schema import Recipe
from strixft.support.errors import StageError

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights to which an update can be added."""

PACKED = ("U8", "I8")
"""Types of weights that bitsandbytes has quantised; its scales stand beside them."""

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of experts' matrices in MXFP4, and of their scales."""


def is_packed(name: str, entry: Entry) -> bool:
    """Return whether bitsandbytes has packed a weight."""
    return entry.dtype in PACKED and name.endswith("weight")


def as_whole_experts(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of files as if experts in MXFP4 were written out in bf16."""
    found = dict(entries)
    for name, entry in entries.items():
        if name.endswith(BLOCKS) and entry.dtype == "U8":
            experts, columns, blocks, _ = entry.shape
            target = name.removesuffix(BLOCKS)
            del found[name], found[f"{target}{SCALES}"]
            found[target] = Entry("BF16", (experts, blocks * MX_BLOCK, columns), 0, 0)
    return found


def own_names(entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of weights, without what bitsandbytes stores beside the packed ones."""
    packed = [name.removesuffix("weight") for name, row in entries.items() if is_packed(name, row)]
    beside = {f"{name}{end}" for name in packed for end in ("SCB", "weight_format")}
    return [name for name in entries if name not in beside and ".weight." not in name]


def adapted_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module, str]]:
    """Return the parameters that an adapter changes, by their names in the base.

    Returns:
        PEFT's layer, the module that owns the parameter, and the parameter's name there.
    """
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, layer in base_of(model).named_modules():
        if isinstance(layer, LoraLayer):
            leaf = getattr(layer, "parameter_name", "weight")
            own = [part for part in path.split(".") if part != "base_layer"]
            found[".".join([*own, leaf])] = (layer, layer.get_base_layer(), leaf)
    return found


def replaced_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that were trained whole beside an adapter, by names in the base."""
    return {
        f"{path}.{leaf}": weight
        for path, module in saved_modules(model)
        for leaf, weight in module.named_parameters()
    }


def without_tied(names: Collection[str], shape: Any, entries: Mapping[str, Entry]) -> set[str]:
    """Leave out parameters that are the same as others, unless the files hold them, too."""
    own = {name for name, _ in shape.named_parameters()}
    held = {group.target for group in groups_of(shape, own_names(entries))}
    return {name for name in names if name in own or name in held}


def quantised_parameters(config: Any, base: str, dtype: torch.dtype) -> set[str]:
    """Return the names of the weights that a base of this storage keeps quantised."""
    if base == "native":
        return set()
    method = next(row for row in METHODS.values() if row.base == base)
    shape = shape_base(config, method, dtype)
    linear = {
        f"{name}.weight"
        for name, part in shape.named_modules()
        if isinstance(part, Linear4bit | Linear8bitLt)
    }
    experts = {name for name, part in packed_in(shape).items() if part.kind == "nf4"}
    return linear | experts  # files have MXFP4 as training sees it


def base_entries(recipe: Recipe) -> dict[str, Entry] | None:
    """Return the tensors in the files of a recipe's model, by name; None if they are unknown.

    Only headers are read, from this machine or from the hub.
    """
    from huggingface_hub import get_safetensors_metadata, is_offline_mode

    folder = model_folder(model_source(recipe.model))
    paths = shard_paths(folder) if folder else []
    found: dict[str, Entry] = {}
    if paths and all(path.is_file() for path in paths):
        for path in paths:
            with Shard(path) as shard:
                found |= shard.entries
        return found
    if recipe.offline or is_offline_mode():
        return None
    try:
        files = get_safetensors_metadata(recipe.model).files_metadata.values()
    except Exception:  # the HTTP client's own, which differs between versions
        return None
    rows = [row for file in files for row in file.tensors.items()]
    return {name: Entry(row.dtype, tuple(row.shape), *row.data_offsets) for name, row in rows}


def _made_by(
    group: Group, entries: Mapping[str, Entry], model: Any, known: Mapping[str, Tensor]
) -> list[str]:
    """Return the names of the parameters that a group becomes.

    Raises:
        ValueError: They cannot be changed through the files.
    """
    tensors = {}
    for name in group.names:
        entry = entries[name]
        if entry.dtype not in (*FLOATS, *PACKED):
            raise ValueError(f"{name} is stored as {entry.dtype}")
        packed = is_packed(name, entry)  # then the file's shape is that of the bytes
        shape = tuple(known[group.target].shape) if packed else entry.shape
        tensors[name] = torch.empty(shape, device="meta")
    made = group.convert(tensors, model)
    for name, tensor in made.items():
        if known[name].shape != tensor.shape:
            sizes = f"{list(known[name].shape)} in the model, {list(tensor.shape)} in the files"
            raise ValueError(f"{name} is {sizes}: they belong to different models")
    if sum(row.numel() for row in tensors.values()) != sum(row.numel() for row in made.values()):
        raise ValueError(f"{group.target} does not consist of the numbers of {group.names[0]}")
    return list(made)


def groups_for(model: Any, entries: Mapping[str, Entry], wanted: Collection[str]) -> list[Group]:
    """Return the groups of a base's tensors that become the wanted parameters.

    Raises:
        StageError: A parameter is missing in the files, or cannot be changed through them.
    """
    found, faults, missing, known = [], [], set(wanted), model.state_dict()
    for group in groups_of(model, own_names(entries)):
        try:
            made = _made_by(group, entries, model, known)
        except Exception as error:  # whatever an operation of transformers raises
            faults.append(first_lines(error))
            continue
        if missing.intersection(made):
            missing.difference_update(made)
            found.append(group)
    if missing:
        why = f"; {faults[0]}" if faults else ""
        raise StageError(
            f"nothing in the files of the base becomes {min(missing)}{why}",
            fix="--set 'export.to=[gguf-lora]'   (the adapter alone)",
            settings={"export.to": ["gguf-lora"]},
        )
    return found


def check_merge(recipe: Recipe, entries: Mapping[str, Entry]) -> None:
    """Run a merge dry: on the names and shapes of a base, with an adapter yet to be trained.

    Raises:
        StageError: The merge would fail.
    """
    method, config = METHODS[recipe.method], load_config(recipe)
    if method.adapter == "none":
        return
    quantised = quantised_parameters(config, method.base, torch.float32)
    base, again = (shape_base(config, METHODS["lora"], torch.float32) for _ in range(2))
    idle = architecture_of(config).idle
    with torch.device("meta"):
        trained = attach_adapter(again, METHODS["lora"], recipe.lora, idle)
    changed = adapted_parameters(trained).keys() | replaced_parameters(trained).keys() | quantised
    whole = as_whole_experts(entries)
    groups_for(base, whole, without_tied(changed, base, whole))
