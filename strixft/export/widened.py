"""Float32 arithmetic on weights of any type, each widened where it is used.

Two correct models in bfloat16 differ more by the rounding of their activations than by that of
their weights. In float32 only the rounding of the weights is left, and no second copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from strixft.model.adapter import base_of

_HALVES = (torch.bfloat16, torch.float16)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALVES


def _widen(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _mixes(name: str, values: Sequence[Any]) -> bool:
    """Return whether a function reads float32 and 16-bit values and writes into none of them."""
    wide = any(isinstance(value, Tensor) and value.dtype is torch.float32 for value in values)
    return wide and any(map(_is_half, values)) and not name.endswith("_")


class Float32(TorchFunctionMode):
    """Run a forward pass in float32, whatever the types of the weights.

    Looked-up embeddings become float32, and so does each 16-bit value that meets float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with widened arguments."""
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            return _widen(func(*args, **kwargs))
        if _mixes(func.__name__, tree_leaves((args, kwargs))):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)


def in_float32(model: nn.Module) -> Float32:
    """Return a context in which a model computes in float32.

    From now on its 4-bit layers multiply in float32, and its experts run one after the other:
    grouped products cast their input to the type of the weights.
    """
    from bitsandbytes.nn import Linear4bit

    base_of(model).set_experts_implementation("eager")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float32
    return Float32()
