"""Attention: the ways to compute it, what each needs to know of packed rows, and which one to take.

Shapes: B rows, T tokens, H heads, D head size, N documents.
"""

from strixft.attention.asked import AttentionCall, watching
from strixft.attention.core import NAME, attend, planned_for, use_kernels, use_rung
from strixft.attention.masks import documents_of, layer_inputs, packed_rows
from strixft.attention.rungs import (
    LADDER,
    RUNGS,
    Heads,
    Rung,
    cannot,
    is_wanted,
    known_bad,
    ladder,
)

__all__ = [
    "LADDER",
    "NAME",
    "RUNGS",
    "AttentionCall",
    "Heads",
    "Rung",
    "attend",
    "cannot",
    "documents_of",
    "is_wanted",
    "known_bad",
    "ladder",
    "layer_inputs",
    "packed_rows",
    "planned_for",
    "use_kernels",
    "use_rung",
    "watching",
]
