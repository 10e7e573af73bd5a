"""Matrix products as training runs them: three layouts, real layers, by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from strixft.bench.result import Row
from strixft.bench.timing import figures, time_work
from strixft.catalog.hosts import Host
from strixft.catalog.models import MODELS
from strixft.guard.host import device_type, find_host
from strixft.support.errors import RecipeError

LAYOUTS = ("forward", "input gradient", "weight gradient")

DTYPES = ("bfloat16", "float16", "float32")

SQUARES = {"cuda": (4096, 8192), "cpu": (1024,)}

MODEL = {"cuda": "meta-llama/Llama-3.1-8B-Instruct", "cpu": "meta-llama/Llama-3.2-1B-Instruct"}

TOKENS = {"cuda": 4096, "cpu": 64}
"""Rows of a micro-batch × their length, by device."""


Shape = tuple[int, int, int]
"""Tokens, columns in, columns out: T, C, N."""


def layer_shapes(model: str, tokens: int) -> dict[str, Shape]:
    """The linear layers of a model, each shape once.

    Args:
        model: A row of `MODELS`.
        tokens: T.
    """
    config = MODELS[model].sides
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
    first = {pair: name for name, pair in reversed(layers.items())}
    return {name: (tokens, *pair) for pair, name in reversed(first.items())}


def _operands(shape: Shape, layout: str, device: str, dtype: Any) -> tuple[Any, Any]:
    """Left and right side as autograd passes them: x (T, C), W (N, C), dy (T, N)."""
    import torch

    tokens, columns, rows = shape

    def filled(*size: int) -> Any:
        return torch.empty(size, device=device, dtype=dtype).normal_()

    if layout == "forward":
        return filled(tokens, columns), filled(rows, columns).t()
    if layout == "input gradient":
        return filled(tokens, rows), filled(rows, columns)
    return filled(tokens, rows).t(), filled(tokens, columns)


def product(shape: Shape, layout: str, device: str, dtype: str) -> Callable[[], Any]:
    """One product, ready to run again and again."""
    import torch

    left, right = _operands(shape, layout, device, getattr(torch, dtype))
    result = torch.mm(left, right)
    return lambda: torch.mm(left, right, out=result)


def _dtypes(asked: str, host: Host) -> list[str]:
    """Those asked for; by default those that the device multiplies in."""
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


def _share(row: Row, host: Host) -> float | None:
    """Of the chip's 16-bit peak, where that is known."""
    peak = host.peak_flop_per_s
    known = peak is not None and row["dtype"] != "float32"
    return row["tflop_per_s"] * 1e12 / peak.value if peak and known else None


def _rows(shapes: dict[str, Shape], dtypes: list[str], host: Host, **how: Any) -> Iterator[Row]:
    for dtype in dtypes:
        for layer, shape in shapes.items():
            for layout in LAYOUTS:
                times = time_work(product(shape, layout, host.device, dtype), host.device, **how)
                flop = 2.0 * shape[0] * shape[1] * shape[2]
                row = {
                    "layer": layer,
                    "tokens×in×out": "×".join(map(str, shape)),
                    "layout": layout,
                    "dtype": dtype,
                    **figures(times, flop / 1e12, "tflop_per_s"),
                }
                yield {**row, "share_of_peak": _share(row, host)}


def bench_gemm(
    model: str = "auto",
    tokens: int = 0,
    dtypes: str = "auto",
    repeat: int = 5,
    check: bool = False,
) -> list[Row]:
    """Time products of square matrices and of a model's layers.

    Args:
        model: Whose layers: a model that planning knows; auto is Llama 3.1 8B, on a CPU 3.2 1B.
        tokens: Rows of the product; 0 is 4096, on a CPU 64.
        dtypes: Comma between them; auto is what this device multiplies in.
        repeat: Turns of each product.
        check: Time each product by torch alone too, in turns.
    """
    host = find_host("auto")
    name = MODEL[host.device] if model == "auto" else model
    squares = {f"square {size}": (size, size, size) for size in SQUARES[host.device]}
    shapes = squares | layer_shapes(name, tokens or TOKENS[device_type()])
    return list(_rows(shapes, _dtypes(dtypes, host), host, repeat=repeat, check=check))


def rates(rows: list[Row]) -> dict[str, float]:
    """FLOP per second by dtype, of the largest square in the forward layout: for planning."""
    found: dict[str, float] = {}
    for row in rows:
        if row["layer"].startswith("square") and row["layout"] == "forward":
            found[row["dtype"]] = row["tflop_per_s"] * 1e12
    return found
