"""Our attention under its names in transformers' attention interface.

A file of its own, as this interface takes seconds to import: the probe calls attention without it.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from strixft.attention.backends import AttentionBackend
from strixft.attention.core import FUNCTIONS, NAME, use_kernels
from strixft.attention.masks import make_mask
from strixft.support.private_hf import calls_attention_by_name

__all__ = ["call_ours", "use_backend"]

for name, function in FUNCTIONS.items():
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, make_mask)

_TOWERS = ("vision", "audio")
"""Beginnings of the names of configurations that a wrapper has for its towers."""


def _set_attention(base: Any, name: str) -> None:
    """Set the attention of the text model; a tower may not be there."""
    inner = {key: name for key in base.config.sub_configs if not key.startswith(_TOWERS)}
    base.set_attn_implementation({"": name, **inner})


def call_ours(base: Any) -> None:
    """Let a transformers model call our attention, if it computes none by its own code."""
    if calls_attention_by_name(base):
        _set_attention(base, NAME)


def use_backend(base: Any, backend: AttentionBackend) -> None:
    """Let a transformers model compute attention by a backend, if not by its own code."""
    if not calls_attention_by_name(base):
        return
    _set_attention(base, backend.implementation)
    if base.device.type == "cuda":
        use_kernels(backend.kernels)
