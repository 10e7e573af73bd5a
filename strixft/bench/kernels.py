"""Kernels of this device: matrix products as in training, memory bandwidth, attention backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from strixft.bench.run import Bench, BenchRow, RateBench
from strixft.bench.timing import work_columns
from strixft.catalog.hosts import Host, budget
from strixft.catalog.models import MODELS
from strixft.guard.host import find_host, training_host
from strixft.model.architecture import architecture_of
from strixft.model.source import load_config
from strixft.probe.checks import dtype_name, probe_attention
from strixft.recipe.schema import Dataset, Recipe
from strixft.support.errors import FitError, RecipeError
from strixft.support.units import GIB, MIB, format_gib

LAYOUTS = ("forward", "input gradient", "weight gradient")

DTYPES = ("bfloat16", "float16", "float32")

SQUARES = {"cuda": (4096, 8192), "cpu": (1024,)}

DEFAULT_MODEL = {
    "cuda": "meta-llama/Llama-3.1-8B-Instruct",
    "cpu": "meta-llama/Llama-3.2-1B-Instruct",
}

DEFAULT_TOKENS = {"cuda": 4096, "cpu": 64}

DEFAULT_GIB = {"cuda": 1.0, "cpu": 0.25}

Shape = tuple[int, int, int]
"""Tokens T, columns in C, columns out N."""


def layer_shapes(model: str, tokens: int) -> dict[str, Shape]:
    """Return the shapes of a model's linear layers, each shape once."""
    config = MODELS[model].text_config
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layers = {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, config["num_key_value_heads"] * head_dim),
        "o_proj": (heads * head_dim, hidden),
        "up_proj": (hidden, config["intermediate_size"]),
        "down_proj": (config["intermediate_size"], hidden),
        "lm_head": (hidden, config["vocab_size"]),
    }
    shapes: dict[str, Shape] = {}
    for name, pair in layers.items():
        if (tokens, *pair) not in shapes.values():
            shapes[name] = (tokens, *pair)
    return shapes


def operands(shape: Shape, layout: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both operands as autograd passes them: of x (T, C), W (N, C), dy (T, N)."""
    tokens, columns, rows = shape

    def filled(*size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_()

    if layout == "forward":
        return filled(tokens, columns), filled(rows, columns).t()  # x·Wᵀ: (T, C), (C, N)
    if layout == "input gradient":
        return filled(tokens, rows), filled(rows, columns)  # dy·W: (T, N), (N, C)
    return filled(tokens, rows).t(), filled(tokens, columns)  # dyᵀ·x: (N, T), (T, C)


def product_columns(
    shape: Shape, layout: str, device: str, dtype: str, repeat: int, *, check: bool = False
) -> BenchRow:
    """Time one product, into the same memory each time, as `tflop_per_s`."""
    left, right = operands(shape, layout, device, getattr(torch, dtype))
    result = torch.mm(left, right)
    tflop = 2 * shape[0] * shape[1] * shape[2] / 1e12

    def work() -> Tensor:
        return torch.mm(left, right, out=result)

    return work_columns("tflop_per_s", tflop, repeat, work, device, check=check)


class Gemm(RateBench):
    """Time products of square matrices and of a model's layers."""

    model: str = Field(
        "auto",
        description="Model that planning knows, for the sizes of its layers; auto is Llama 3.1 8B,"
        " on a CPU Llama 3.2 1B.",
    )
    tokens: int = Field(0, ge=0, description="Rows of the left matrix; 0 means 4096, on a CPU 64.")
    dtypes: str = Field(
        "auto", description="Comma-separated dtypes; auto means those this device multiplies in."
    )
    repeat: int = Field(5, ge=1, description="Turns of each product.")
    check: bool = Field(False, description="Also time each product by torch alone, in turns.")

    def _dtypes(self, host: Host) -> list[str]:
        if self.dtypes == "auto":
            if host.device == "cpu":
                return ["float32"]
            return [name for name in DTYPES if host.bfloat16 or name != "bfloat16"]
        names = [word.strip() for word in self.dtypes.split(",")]
        for name in names:
            if name not in DTYPES:
                raise RecipeError(
                    f"products are not measured in {name!r}", fix=f"--dtypes {','.join(DTYPES)}"
                )
        return names

    def measure(self) -> list[BenchRow]:
        """Time every shape in every layout and dtype."""
        host, rows = find_host("auto"), list[BenchRow]()
        device, peak = host.device, host.peak_flop_per_s
        model = DEFAULT_MODEL[device] if self.model == "auto" else self.model
        shapes = {f"square {size}": (size, size, size) for size in SQUARES[device]}
        shapes |= layer_shapes(model, self.tokens or DEFAULT_TOKENS[device])
        for dtype in self._dtypes(host):
            for layer, shape in shapes.items():
                for layout in LAYOUTS:
                    rate = product_columns(
                        shape, layout, device, dtype, self.repeat, check=self.check
                    )
                    known = peak and dtype != "float32"  # it is the chip's 16-bit peak
                    share = rate["tflop_per_s"] * 1e12 / peak.value if peak and known else None
                    rows.append(
                        {
                            "layer": layer,
                            "tokens×in×out": "×".join(map(str, shape)),
                            "layout": layout,
                            "dtype": dtype,
                            **rate,
                            "share_of_peak": share,
                        }
                    )
        return rows

    def rates(self, rows: list[BenchRow]) -> dict[str, float | dict[str, float]]:
        """Return FLOP of the largest square in the forward layout, by dtype."""
        return {
            "matmul": {
                row["dtype"]: row["tflop_per_s"] * 1e12
                for row in rows
                if row["layer"].startswith("square") and row["layout"] == "forward"
            }
        }


class Bandwidth(RateBench):
    """Time operations that move bytes and compute next to nothing."""

    size_gib: float = Field(
        0.0,
        ge=0,
        description="Size of each of two buffers, far above every cache; 0 means 1, on a CPU 0.25.",
    )
    repeat: int = Field(5, ge=1, description="Turns of each operation.")
    check: bool = Field(False, description="Also time each operation by torch alone, in turns.")

    def measure(self) -> list[BenchRow]:
        """Time a copy, reading, writing, and a matrix times a vector as in decoding.

        Raises:
            FitError: The buffers do not fit.
        """
        host = find_host("auto")
        num_bytes = round((self.size_gib or DEFAULT_GIB[host.device]) * GIB)
        if 2.5 * num_bytes > budget(host, 0).num_bytes:
            raise FitError(
                f"two buffers of {format_gib(num_bytes)} do not fit into the memory of {host.name}",
                fix="--size-gib with a smaller number",
            )
        bus, rows = host.bus_bytes_per_s, []
        for name, (work, gigabytes) in _operations(num_bytes, host.device).items():
            rate = work_columns(
                "gb_per_s", gigabytes, self.repeat, work, host.device, check=self.check
            )
            share = rate["gb_per_s"] * 1e9 / bus.value if bus else None
            rows.append({"work": name, "size_gib": num_bytes / GIB, **rate, "share_of_bus": share})
        return rows

    def rates(self, rows: list[BenchRow]) -> dict[str, float | dict[str, float]]:
        """Return bytes of the copy."""
        return {"bandwidth": next(r["gb_per_s"] * 1e9 for r in rows if r["work"] == "copy")}


def _operations(num_bytes: int, device: str) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return each operation and the 10⁹ bytes that it moves."""
    dtype, columns = torch.float32 if device == "cpu" else torch.float16, 8192
    count = num_bytes // dtype.itemsize // columns * columns
    source = torch.ones(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, columns), source[:columns]  # (N, C), (C)
    product = torch.empty(len(matrix), dtype=dtype, device=device)  # (N)
    moved = count * dtype.itemsize / 1e9
    return {
        "copy": (lambda: target.copy_(source), 2 * moved),
        "read": (lambda: torch.sum(source), moved),
        "write": (lambda: target.fill_(1), moved),
        "matrix × vector": (lambda: torch.mv(matrix, vector, out=product), moved),
    }


class Attention(Bench):
    """Run every attention backend forward and backward over packed rows, against float64.

    Planning and training choose by the same probe. Stored results of this device are replaced.
    """

    model: str = Field(
        "auto",
        description="Model whose heads are used: a name that planning knows, a folder or a hub id;"
        " auto is Llama 3.1 8B, on a CPU Llama 3.2 1B.",
    )

    def measure(self) -> list[BenchRow]:
        """Probe every attention backend on this device."""
        host = training_host()
        name = DEFAULT_MODEL[host.device] if self.model == "auto" else self.model
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
