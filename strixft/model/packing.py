"""Experts that are packed to 4 bits while they are loaded, or kept as their file has them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from strixft.model.experts import matrices_of
from strixft.model.groups import Group, groups_of
from strixft.model.packed_experts import (
    Kind,
    PackedExperts,
    can_pack,
    pack_shape,
    packed,
    written_out,
)
from strixft.model.stream import DTYPES, StreamedTensor


def packing(whole: type, dtype: torch.dtype, packed_as: Kind = "nf4") -> type:
    """Return a class of models that are built with packed experts.

    Args:
        whole: Class of transformers models.
        dtype: Type in which they compute.
        packed_as: Format of the experts.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        pack_shape(self, dtype, packed_as)

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
class _Made:
    """A tensor that is made when it is asked for, with the methods of safetensors' slices."""

    make: Callable[[], Tensor]
    like: Tensor
    """The same on `meta`."""

    def get_dtype(self) -> str:
        """Return the type's name in a file's header."""
        return next(name for name, dtype in DTYPES.items() if dtype is self.like.dtype)

    def get_shape(self) -> list[int]:
        """Return the sizes."""
        return list(self.like.shape)

    def __getitem__(self, _: Any) -> Tensor:
        """Return the tensor."""
        return self.make()


def pack_while_read(tensors: Mapping[str, StreamedTensor], model: Any) -> dict[str, Any]:
    """Return the tensors of files with those of experts replaced by packed ones.

    Args:
        tensors: By their names in the files.
        model: The model on `meta`, its experts not packed.
    """
    weights = matrices_of(model)
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
            found[f"{group.target}.{name}"] = _Made(partial(packing.take, name), buffer)
    return found


def mxfp4_as_stored(
    tensors: Mapping[str, StreamedTensor], model: Any, dtype: torch.dtype, *, unpack: bool
) -> dict[str, Any]:
    """Return the tensors of files with experts in MXFP4 under the names of their places.

    Args:
        tensors: By their names in the files: an expert's matrices, (D, C), are `_blocks`,
            (E, D, C / 32, 16), and `_scales`, (E, D, C / 32).
        model: The model on `meta`, its experts not packed.
        dtype: Type in which it computes.
        unpack: Experts are parameters.
    """
    found: dict[str, Any] = dict(tensors)
    for target, whole in matrices_of(model).items():
        parts = {"codes": f"{target}_blocks", "scales": f"{target}_scales"}
        if not all(name in found for name in parts.values()):
            continue  # transformers says what is missing
        stored = {part: found.pop(name) for part, name in parts.items()}
        with torch.device("meta"):
            shape = PackedExperts(tuple(whole.shape), dtype, "mxfp4", flipped=True)
        if unpack:
            made = partial(_written_out, stored, shape, dtype)
            found[target] = _Made(made, torch.empty_like(whole, dtype=dtype))
            continue
        for part, buffer in shape.named_buffers():
            found[f"{target}.{part}"] = _Made(partial(_flat, stored[part]), buffer)
    return found


def _flat(tensor: StreamedTensor) -> Tensor:
    return tensor[...].flatten(1)


def _written_out(
    stored: Mapping[str, StreamedTensor], shape: PackedExperts, dtype: torch.dtype
) -> Tensor:
    """Return experts as a parameter, (E, C, D), written out one by one."""
    codes, scales = (_flat(stored[part]) for part in ("codes", "scales"))
    whole = torch.empty(shape.shape, dtype=dtype, device=codes.device)
    for number, (code, scale) in enumerate(zip(codes, scales, strict=True)):
        one = torch.Size((1, *shape.stored[1:]))
        whole[number] = written_out([code[None], scale[None]], one, dtype, "mxfp4")[0].T
    return whole
