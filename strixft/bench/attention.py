"""The ways to compute attention on this device: right or not, and how long each takes."""

from __future__ import annotations

from typing import Any

from strixft.bench.gemm import MODEL
from strixft.bench.result import Row
from strixft.guard.host import training_host
from strixft.model.architecture import architecture_of
from strixft.model.load import load_config
from strixft.probe.checks import Verdict, dtype_name, probe_attention
from strixft.recipe.schema import Dataset, Recipe
from strixft.support.units import MIB

FIGURES = ("forward_ms", "backward_ms", "error", "allowed_error")


def _row(verdict: Verdict, shown: dict[str, Any]) -> Row:
    figures, peak = verdict.figures, verdict.figures.get("peak_bytes")
    return {
        "attention": verdict.backend.name,
        "verdict": verdict.outcome,
        **{name: figures.get(name) for name in FIGURES},
        "peak_mib": None if peak is None else peak / MIB,
        **shown,
        "reason": verdict.reason,
    }


def bench_attention(model: str = "auto") -> list[Row]:
    """Run every way of attention forward and backward over packed rows, against float64.

    It is what planning and training go by on this device; what they knew of it is measured again.

    Args:
        model: Whose heads: a name that planning knows, a folder or a hub id; auto is Llama 3.1 8B,
            on a CPU 3.2 1B.
    """
    host = training_host()
    name = MODEL[host.device] if model == "auto" else model
    config = load_config(Recipe(model=name, method="lora", dataset=Dataset(source="none")))
    heads = architecture_of(config).heads
    sizes = f"{heads.query_heads}/{heads.key_heads}×{heads.head_size}"
    shown = {"heads": sizes, "dtype": dtype_name(host)}
    verdicts = probe_attention(heads, host, fresh=True, peak=True)
    return [_row(verdict, shown) for verdict in verdicts]
