"""Experts that are packed to 4 bits while they are loaded, one tensor of a layer at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strixft.model.experts import fused_experts, parameters_of
from strixft.model.groups import Group, groups_of
from strixft.model.packed_experts import PackedExperts, can_pack, pack_shape, packed
from strixft.model.stream import StreamedTensor


def packing(whole: type, dtype: torch.dtype) -> type:
    """Return a class of models that are built with packed experts.

    Args:
        whole: Class of transformers models.
        dtype: Type in which they compute.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        pack_shape(self, dtype)

    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


@dataclass
class _Packing:
    """Experts' tensors of the files that become one parameter, packed when it is asked for."""

    group: Group
    tensors: Mapping[str, StreamedTensor]
    model: Any
    made: dict[str, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, part: str) -> Tensor:
        """Return a tensor of `PackedExperts`, once."""
        with self.lock:
            if not self.made:
                whole = {name: self.tensors[name][...] for name in self.group.names}
                self.made = packed(self.group.convert(whole, self.model)[self.group.target])
            return self.made.pop(part)


@dataclass(frozen=True)
class _Part:
    """One tensor of packed experts, with the methods of safetensors' slices."""

    packing: _Packing
    name: str
    shape: Tensor
    """The same on `meta`."""

    def get_dtype(self) -> str:
        return {torch.uint8: "U8", torch.float32: "F32"}[self.shape.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape.shape)

    def __getitem__(self, _: Any) -> Tensor:
        return self.packing.take(self.name)


def pack_while_read(tensors: Mapping[str, StreamedTensor], model: Any) -> dict[str, Any]:
    """Return the tensors of files with those of experts replaced by packed ones.

    Args:
        tensors: By their names in the files.
        model: The model on `meta`, its experts not packed.
    """
    weights = {
        f"{path}.{name}": getattr(experts, name)
        for path, experts in fused_experts(model).items()
        for name in parameters_of(experts)
    }
    found: dict[str, Any] = dict(tensors)
    for group in groups_of(model, tensors) if weights else ():
        whole = weights.get(group.target)
        if whole is None or not can_pack(whole):
            continue
        for name in group.names:
            del found[name]
        packing = _Packing(group, tensors, model)
        with torch.device("meta"):
            shape = PackedExperts(tuple(whole.shape), whole.dtype)
        for name, buffer in shape.named_buffers():
            found[f"{group.target}.{name}"] = _Part(packing, name, buffer)
    return found
