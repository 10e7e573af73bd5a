"""bitsandbytes, imported without inductor, which takes a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from typing import Any

import torch


def _compile_when_called(function: Any = None, **options: Any) -> Any:
    if function is None:
        return partial(_compile_when_called, **options)
    compiled: Callable[[], Any] = cache(partial(torch.compile, function, **options))
    return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Let `torch.compile` as a decorator wait for the first call.

    bitsandbytes 0.50 decorates functions that few runs call, and torch 2.13 imports inductor then,
    which takes a second. This ends where torch imports it later.
    """
    right: Callable[..., Any] = torch.compile
    torch.compile = _compile_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = right


with _compiling_later():
    import bitsandbytes as bitsandbytes
    from bitsandbytes.functional import QuantState as QuantState
    from bitsandbytes.functional import create_dynamic_map as create_dynamic_map
    from bitsandbytes.functional import dequantize_4bit as dequantize_4bit
    from bitsandbytes.functional import get_4bit_type as get_4bit_type
    from bitsandbytes.functional import quantize_4bit as quantize_4bit
    from bitsandbytes.nn import Int8Params as Int8Params
    from bitsandbytes.nn import Linear4bit as Linear4bit
    from bitsandbytes.nn import Linear8bitLt as Linear8bitLt
    from bitsandbytes.nn import Params4bit as Params4bit
