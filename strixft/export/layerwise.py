"""Rows of tokens carried through a model a layer at a time: one layer is in memory, from disk.

The model stands on `meta`. A first call with layers that let their input through tells what each
layer is called with; then a layer is filled, run for all rows, and emptied; a last call with layers
that give what the last one gave runs norm and head. So each model's own code does all of it.

Shapes: T tokens, C channels, K positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit
from safetensors import safe_open
from torch import Tensor, nn

from strixft.errors import StageError
from strixft.export.merge import Update, as_stored, is_quantised, quantise_int8, quantise_nf4
from strixft.int8 import Int8Linear
from strixft.methods import METHODS
from strixft.model import ADAPTER_NAME, attach_adapter, base_of, nf4_parameter, shape_base
from strixft.recipe import Recipe
from strixft.step.layers import decoder_layers

_PREFIX = "base_model.model."

Values = Callable[[nn.Module, str], dict[str, Tensor]]
"""A module and its parameter's name in the checkpoint → what is put into the module, by name."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside the hidden states."""


class Checkpoint:
    """Tensors of a folder of safetensors files, read when they are asked for.

    Args:
        folder: With the files.
        device: Where tensors go.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._files = {
            name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)
        }

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            StageError: There is none of this name.
        """
        if name not in self._files:
            raise StageError(
                f"{self._folder} has no {name}, so merges cannot be compared",
                fix="download the base model again",
            )
        with safe_open(self._files[name], "pt", self._device) as file:
            found: Tensor = file.get_tensor(name)
        return found


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


@dataclass(frozen=True)
class Streamed:
    """A model on `meta` whose parameters have values only where they are used."""

    model: nn.Module
    values: Values

    @cached_property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """The decoder's layers with their names, in order."""
        names = {module: name for name, module in self.model.named_modules()}
        return [(names[layer], layer) for layer in decoder_layers(self.model)]

    @cached_property
    def ends(self) -> list[str]:
        """Parameters outside the layers; tied ones by each of their names."""
        inside = tuple(f"{name}." for name, _ in self.layers)
        every = self.model.named_parameters(remove_duplicate=False)
        return [name for name, _ in every if not name.startswith(inside)]

    def _ends_without(self, part: nn.Module, other: Any) -> list[str]:
        """Those outside the layers, less a part's weight where it is not another one's too."""
        own = part.weight is not other.weight
        names = {module: name for name, module in self.model.named_modules()}
        return [name for name in self.ends if not own or name != f"{names[part]}.weight"]

    @contextlib.contextmanager
    def filled(self, names: Sequence[str]) -> Iterator[None]:
        """Within this block, these parameters have their values."""
        before, made = [], {}
        try:
            for name in names:
                path, _, leaf = name.rpartition(".")
                owner = self.model.get_submodule(path)
                empty = owner._parameters[leaf]
                if id(empty) not in made:
                    made[id(empty)] = self.values(owner, name)
                before.append((owner, dict(owner._parameters), dict(owner._buffers)))
                _put(owner, made[id(empty)])
            yield
        finally:
            for owner, parameters, buffers in reversed(before):
                owner._parameters.update(parameters)
                owner._buffers.update(buffers)

    @torch.no_grad()
    def begin(self, rows: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Call]]]:
        """Hidden states before the first layer, (1, T, C) of each row, and each layer's calls.

        Args:
            rows: Token ids, (1, T) each.
        """
        base = base_of(self.model)
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        hidden, calls = [], []
        with self.filled(self._ends_without(head, embedding)):
            for ids in rows:
                with _passing(self.layers) as seen:
                    base_of(self.model).get_decoder()(input_ids=ids, use_cache=False)
                hidden.append(seen[0][0])
                calls.append([(args, options) for _, args, options in seen])
        return hidden, calls

    @torch.no_grad()
    def layer(
        self, index: int, hidden: Sequence[Tensor], calls: Sequence[Sequence[Call]]
    ) -> list[Tensor]:
        """Hidden states after a layer.

        Args:
            index: Of the layer.
            hidden: Of each row before it, (1, T, C).
            calls: Of each row, as `begin` gave them.
        """
        name, layer = self.layers[index]
        parts = [f"{name}.{part}" for part, _ in layer.named_parameters()]
        found = []
        with self.filled(parts):
            for states, row in zip(hidden, calls, strict=True):
                args, options = row[index]
                after = layer(states, *args, **options)
                found.append(after[0] if isinstance(after, tuple) else after)
        return found

    @contextlib.contextmanager
    def ending(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Norm and head, filled: hidden states (1, T, C) and positions (K,) → logits (K, V)."""
        base = base_of(self.model)
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()

        @torch.no_grad()
        def logits(hidden: Tensor, positions: Tensor) -> Tensor:
            with _passing(self.layers, hidden):
                found = self.model(inputs_embeds=hidden, logits_to_keep=positions, use_cache=False)
            scores: Tensor = found.logits[0].float()
            return scores

        with self.filled(self._ends_without(embedding, head)):
            yield logits


def _put(owner: nn.Module, values: Mapping[str, Tensor]) -> None:
    for leaf, value in values.items():
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        elif isinstance(value, nn.Parameter):
            owner._parameters[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


@contextlib.contextmanager
def _passing(
    layers: Sequence[tuple[str, nn.Module]], given: Tensor | None = None
) -> Iterator[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """Within this block, layers let hidden states through, or give these; yields their calls."""
    seen = []

    def forward(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((hidden, args, options))
        return hidden if given is None else given

    for _, layer in layers:
        layer.forward = forward
    try:
        yield seen
    finally:
        for _, layer in layers:
            del layer.forward


def trained_function(
    recipe: Recipe, config: Any, base: Checkpoint, adapter: Checkpoint, dtype: torch.dtype
) -> Streamed:
    """The function that was trained: the quantised base and the adapter beside it.

    Args:
        recipe: Of the run.
        config: The model's configuration.
        base: The original weights.
        adapter: The trained ones.
        dtype: What the base computes in.
    """
    method = METHODS[recipe.method]
    model = shape_base(config, method, dtype, buffers=True)
    with torch.device("meta"):
        model = attach_adapter(model, method, recipe.lora).eval()

    def values(owner: nn.Module, name: str) -> dict[str, Tensor]:
        leaf = name.rpartition(".")[2]
        if f".{ADAPTER_NAME}." in name:
            return {leaf: adapter.read(name.replace(f".{ADAPTER_NAME}.", ".")).float()}
        stored = base.read(name.removeprefix(_PREFIX).replace(".base_layer.", ".")).to(dtype)
        if leaf == "weight" and isinstance(owner, Linear4bit):
            return {leaf: nf4_parameter(*quantise_nf4(stored))}
        if leaf == "weight" and isinstance(owner, Int8Linear):
            integers, scales = quantise_int8(stored)
            return {leaf: Int8Params(integers, requires_grad=False), "scales": scales}
        return {leaf: stored}

    return Streamed(model, values)


def merged_function(
    config: Any, base: Checkpoint, updates: Mapping[str, Update], kept: str, dtype: torch.dtype
) -> Streamed:
    """What a merge would write.

    Args:
        config: The model's configuration.
        base: The original weights.
        updates: Of the adapter, by the weight's name.
        kept: How the merge takes the base: `native`, `nf4` or `int8`.
        dtype: What the merged model computes in.
    """
    model = shape_base(config, METHODS["lora"], dtype, buffers=True).eval()

    def values(_: nn.Module, name: str) -> dict[str, Tensor]:
        weight = base.read(name)
        changed = is_quantised(name, tuple(weight.shape), kept)
        if changed or name in updates:
            merged = as_stored(weight, kept if changed else "native")
            if name in updates:
                updates[name].apply_(merged, slice(None))
            weight = merged.to(weight.dtype)  # it is written in the type of the base's file
        return {name.rpartition(".")[2]: weight.to(dtype)}

    return Streamed(model, values)
