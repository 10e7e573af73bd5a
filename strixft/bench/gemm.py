"""Matrix products as training runs them: three layouts, layers of a real model, several dtypes.

Shapes: T tokens, C columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from strixft.bench.result import BenchRow, Options
from strixft.bench.timing import rate_columns, time_work
from strixft.catalog.hosts import Host
from strixft.catalog.models import MODELS
from strixft.guard.host import find_host
from strixft.support.errors import RecipeError

LAYOUTS = ("forward", "input gradient", "weight gradient")

DTYPES = ("bfloat16", "float16", "float32")

SQUARES = {"cuda": (4096, 8192), "cpu": (1024,)}

DEFAULT_MODEL = {
    "cuda": "meta-llama/Llama-3.1-8B-Instruct",
    "cpu": "meta-llama/Llama-3.2-1B-Instruct",
}

DEFAULT_TOKENS = {"cuda": 4096, "cpu": 64}
"""T, by device."""

Shape = tuple[int, int, int]
"""T, C, N."""


class GemmOptions(Options):
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


def operands(shape: Shape, layout: str, device: str, dtype: Any) -> tuple[Any, Any]:
    """Return both operands as autograd passes them: of x (T, C), W (N, C), dy (T, N)."""
    import torch

    tokens, columns, rows = shape

    def filled(*size: int) -> Any:
        return torch.empty(size, device=device, dtype=dtype).normal_()

    if layout == "forward":
        return filled(tokens, columns), filled(rows, columns).t()  # x·Wᵀ: (T, C), (C, N)
    if layout == "input gradient":
        return filled(tokens, rows), filled(rows, columns)  # dy·W: (T, N), (N, C)
    return filled(tokens, rows).t(), filled(tokens, columns)  # dyᵀ·x: (N, T), (T, C)


def product(shape: Shape, layout: str, device: str, dtype: str) -> Callable[[], Any]:
    """Return a function that computes one product into the same memory each time."""
    import torch

    left, right = operands(shape, layout, device, getattr(torch, dtype))
    result = torch.mm(left, right)
    return lambda: torch.mm(left, right, out=result)


def _dtypes(asked: str, host: Host) -> list[str]:
    if asked == "auto":
        if host.device == "cpu":
            return ["float32"]
        return [name for name in DTYPES if host.bfloat16 or name != "bfloat16"]
    names = [word.strip() for word in asked.split(",")]
    for name in names:
        if name not in DTYPES:
            raise RecipeError(
                f"products are not measured in {name!r}", fix=f"--dtypes {','.join(DTYPES)}"
            )
    return names


def bench_gemm(options: GemmOptions) -> list[BenchRow]:
    """Time products of square matrices and of a model's layers, in every layout and dtype."""
    host, rows = find_host("auto"), list[BenchRow]()
    device, peak = host.device, host.peak_flop_per_s
    model = DEFAULT_MODEL[device] if options.model == "auto" else options.model
    shapes = {f"square {size}": (size, size, size) for size in SQUARES[device]}
    shapes |= layer_shapes(model, options.tokens or DEFAULT_TOKENS[device])
    for dtype in _dtypes(options.dtypes, host):
        for layer, shape in shapes.items():
            tflop = 2 * shape[0] * shape[1] * shape[2] / 1e12
            for layout in LAYOUTS:
                work = product(shape, layout, device, dtype)
                times = time_work(work, device, options.repeat, check=options.check)
                rate = rate_columns(times, tflop, "tflop_per_s")
                known = peak is not None and dtype != "float32"  # it is the chip's 16-bit peak
                rows.append(
                    {
                        "layer": layer,
                        "tokens×in×out": "×".join(map(str, shape)),
                        "layout": layout,
                        "dtype": dtype,
                        **rate,
                        "share_of_peak": (
                            rate["tflop_per_s"] * 1e12 / peak.value if peak and known else None
                        ),
                    }
                )
    return rows


def rates_by_dtype(rows: list[BenchRow]) -> dict[str, float]:
    """Return FLOP per second of the largest square in the forward layout, for planning."""
    return {
        row["dtype"]: row["tflop_per_s"] * 1e12
        for row in rows
        if row["layer"].startswith("square") and row["layout"] == "forward"
    }
