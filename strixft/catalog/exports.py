"""`KINDS` of export of a trained run, and `QUANTISATIONS` of a GGUF file, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from strixft.support.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportKind:
    """One form of a trained model that a server can use."""

    name: str
    needs: tuple[str, ...] = ()
    """Kinds from which it is made."""
    why: str


KINDS: Table[ExportKind] = Table(
    "export",
    ExportKind(name="merged", why="a model folder for transformers, vLLM, llama.cpp's converter"),
    ExportKind(
        name="gguf", needs=("merged",), why="one file for llama.cpp and programs built on it"
    ),
    ExportKind(name="gguf-lora", why="the adapter alone, for a server that has the base as GGUF"),
    ExportKind(name="ollama", needs=("merged", "gguf"), why="a Modelfile beside the GGUF file"),
    ExportKind(
        name="lemonade",
        needs=("merged", "gguf"),
        why="the smallest GGUF file in a folder of its own, and the command for it",
    ),
    ExportKind(name="vllm", needs=("merged",), why="the command that serves the merged folder"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """Storage of a GGUF file's weights, and the agreement with the trained model that it owes."""

    name: str
    bits: float
    """Approximate bits of a weight."""
    least_top1: float
    """Share of positions at which it must choose the trained model's token."""
    least_greedy: float
    """Share of an answer that it must write before it first differs, mean over the prompts."""


QUANTISATIONS: Table[Quantisation] = Table(
    "quantisation",
    Quantisation(name="f16", bits=16, least_top1=0.99, least_greedy=0.95),
    Quantisation(name="bf16", bits=16, least_top1=0.99, least_greedy=0.95),
    Quantisation(name="q8_0", bits=8.5, least_top1=0.97, least_greedy=0.85),
    Quantisation(name="q6_k", bits=6.6, least_top1=0.95, least_greedy=0.75),
    Quantisation(name="q5_k_m", bits=5.7, least_top1=0.92, least_greedy=0.65),
    Quantisation(name="q4_k_m", bits=4.9, least_top1=0.88, least_greedy=0.5),
)
"""GGUF storage by name. The bounds are ours: a larger loss should not stay unnoticed."""


def with_needs(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return kinds and the kinds they need, in the order in which they are made.

    >>> with_needs(("ollama",))
    ('merged', 'gguf', 'ollama')
    """
    wanted = {name for kind in kinds for name in (kind, *KINDS[kind].needs)}
    return tuple(name for name in KINDS if name in wanted)


def asked_exports(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split names of exports into kinds, and storage of a GGUF file.

    Raises:
        RecipeError: There is no such export.

    >>> asked_exports(["merged", "q4_k_m"])
    (('merged', 'gguf'), ('q4_k_m',))
    """
    kinds, quantisations = [], []
    for name in names:
        if name in QUANTISATIONS:
            quantisations.append(name)
        kinds.append("gguf" if name in QUANTISATIONS else KINDS[name].name)
    return tuple(dict.fromkeys(kinds)), tuple(dict.fromkeys(quantisations))
