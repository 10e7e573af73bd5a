"""Attention backends on this device: correct or not, and the time of each."""

from __future__ import annotations

from pydantic import Field

from strixft.bench.gemm import DEFAULT_MODEL
from strixft.bench.result import BenchRow, Options
from strixft.guard.host import training_host
from strixft.model.architecture import architecture_of
from strixft.model.load import load_config
from strixft.probe.checks import dtype_name, probe_attention
from strixft.recipe.schema import Dataset, Recipe
from strixft.support.units import MIB


class AttentionOptions(Options):
    """Run every attention backend forward and backward over packed rows, against float64.

    Planning and training choose by the same probe. Stored results of this device are replaced.
    """

    model: str = Field(
        "auto",
        description="Model whose heads are used: a name that planning knows, a folder or a hub id;"
        " auto is Llama 3.1 8B, on a CPU Llama 3.2 1B.",
    )


def bench_attention(options: AttentionOptions) -> list[BenchRow]:
    """Probe every attention backend on this device."""
    host = training_host()
    name = DEFAULT_MODEL[host.device] if options.model == "auto" else options.model
    config = load_config(Recipe(model=name, method="lora", dataset=Dataset(source="none")))
    heads = architecture_of(config).heads
    rows = []
    for verdict in probe_attention(heads, host, fresh=True, peak=True):
        figures = verdict.figures
        peak_bytes = figures.get("peak_bytes")
        keys = ("forward_ms", "backward_ms", "error", "allowed_error")
        rows.append(
            {
                "attention": verdict.backend.name,
                "verdict": verdict.outcome,
                **{key: figures.get(key) for key in keys},
                "peak_mib": None if peak_bytes is None else peak_bytes / MIB,
                "heads": f"{heads.query_heads}/{heads.key_heads}×{heads.head_size}",
                "dtype": dtype_name(host),
                "reason": verdict.reason,
            }
        )
    return rows
