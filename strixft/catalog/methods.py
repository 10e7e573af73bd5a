"""`METHODS`: storage of the base and trained weights of each method, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strixft.support.tables import Table

BITSANDBYTES = "bitsandbytes>=0.50,<0.51"
"""Stores weights in 4 bits; versions before 0.50 return garbage on RDNA (its PR #1885)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train."""

    name: str
    base: Literal["native", "nf4", "int8"]
    """Storage of the base: the device's own dtype, 4-bit NF4 blocks, or 8-bit integers with a scale
    for each row."""
    adapter: Literal["none", "lora", "dora"]
    """Weights trained beside the frozen base; `none` trains every weight of the base."""
    why: str
    source: str


METHODS: Table[Method] = Table(
    "method",
    Method(
        name="full",
        base="native",
        adapter="none",
        why="trains every weight, in bf16 with float32 masters; 12 bytes a weight, the most memory",
        source="plain fine-tuning; strixft/step/optimizer.py",
    ),
    Method(
        name="lora",
        base="native",
        adapter="lora",
        why="trains thin matrices beside a frozen base",
        source="arXiv:2106.09685",
    ),
    Method(
        name="dora",
        base="native",
        adapter="dora",
        why="LoRA with a trained length per column; slower, a little closer to full",
        source="arXiv:2402.09353",
    ),
    Method(
        name="qlora",
        base="nf4",
        adapter="lora",
        why="LoRA over a base of 4.13 bits per weight; a 70B fits in 128 GB",
        source="arXiv:2305.14314",
    ),
    Method(
        name="int8-lora",
        base="int8",
        adapter="lora",
        why="LoRA over a base of 8 bits per weight; closer to the base than 4 bits, and slower",
        source="arXiv:2208.07339",
    ),
)
