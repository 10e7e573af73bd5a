"""Attention: the ways to compute it, what each needs to know of packed rows, and which one to take.

Shapes: B rows, T tokens, H heads, D head size, N documents.
"""

from strixft.attention.core import NAME, attend, planned_for, use_kernels, use_rung
from strixft.attention.masks import attention_inputs, documents_of
from strixft.attention.rungs import (
    LADDER,
    RUNGS,
    Heads,
    Rung,
    cannot,
    is_wanted,
    known_bad,
    ladder,
    window_sizes,
)

__all__ = [
    "LADDER",
    "NAME",
    "RUNGS",
    "Heads",
    "Rung",
    "attend",
    "attention_inputs",
    "cannot",
    "documents_of",
    "is_wanted",
    "known_bad",
    "ladder",
    "planned_for",
    "use_kernels",
    "use_rung",
    "window_sizes",
]
