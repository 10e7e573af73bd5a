"""Benches: measurements that anybody can repeat with `strixft bench WHAT`.

A bench is a function that takes its `Options` and returns rows, and a row of `BENCHES`. The fields
of the options become options of the command line.
"""

from __future__ import annotations

import inspect
import pkgutil
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from strixft.bench.result import BenchRow, Measured, Options, append, require_store
from strixft.bench.timing import sensors_of, watched
from strixft.catalog.hosts import Sourced
from strixft.catalog.rates import cpu_name, device_name, write_rates
from strixft.support.files import now, versions
from strixft.support.tables import Table


@dataclass(frozen=True, slots=True)
class Bench:
    """One thing that can be measured."""

    name: str
    help: str
    """One line for `strixft bench --help`."""
    path: str
    """Module of this folder and function, imported on first use."""
    gives_rates: bool = False
    """Planning uses the rates that it measures: it has the option `--host-row`."""

    @property
    def measure(self) -> Callable[[Any], list[BenchRow]]:
        """The function that measures."""
        function: Callable[[Any], list[BenchRow]] = pkgutil.resolve_name(
            f"strixft.bench.{self.path}"
        )
        return function

    @property
    def options(self) -> type[Options]:
        """The class of its options."""
        options: type[Options] = get_type_hints(self.measure)["options"]
        return options


BENCHES: Table[Bench] = Table(
    "bench",
    Bench("gemm", "matrix products in the layouts of training", "gemm:bench_gemm", True),
    Bench("bandwidth", "memory bandwidth", "bandwidth:bench_bandwidth", True),
    Bench("attention", "attention backends: correct or not, and time", "attention:bench_attention"),
    Bench("train", "the training step, beside its plan and the product rate", "train:bench_train"),
    Bench("prefill", "reading of prompts, in process or by a server", "decode:bench_prefill"),
    Bench("decode", "generation, in process or by a server", "decode:bench_decode"),
    Bench("image", "images from a server, in seconds each", "image:bench_image"),
    Bench("data", "data preparation, beside TRL's", "data:bench_data"),
)
"""Everything that can be measured."""


def _device_label(device: str) -> str:
    """Return name and architecture of the GPU, or the processor and its threads in use."""
    import torch

    if device == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name} {getattr(properties, 'gcnArchName', '')}".strip()


def _host(rows: list[BenchRow], device: str) -> dict[str, Any]:
    """Describe the device that did the work: a server's, or this machine's."""
    servers = {row["server"] for row in rows if row.get("server")}
    return {
        "device": ", ".join(sorted(servers)) if servers else _device_label(device),
        "type": "server" if servers else device,
        "machine": platform.machine(),
        "system": platform.platform(),
    }


def run_bench(what: str, *, save: bool = True, **settings: Any) -> Measured:
    """Measure, and append the result to the local store.

    Args:
        what: A row of `BENCHES`.
        save: Append the result.
        **settings: Options of that bench.

    Raises:
        RecipeError: There is no such bench, or it has no such option.
        HostError: Results cannot be stored.
    """
    from strixft.guard.host import device_type  # imports torch, which `--help` does not need

    bench, started, clock = BENCHES[what], now(), time.monotonic()
    options = bench.options.parse(settings)
    if save:
        require_store()
    device = device_type()
    with watched(sensors_of(device)) as conditions:
        rows = bench.measure(options)
    result = Measured(
        bench=what,
        started=started,
        seconds=round(time.monotonic() - clock, 3),
        host=_host(rows, device),
        versions=versions(),
        settings=options.model_dump(),
        conditions=conditions,
        rows=rows,
    )
    if save:
        append(result)
    return result


def write_host_row(result: Measured) -> Path:
    """Store measured rates, so that `--host auto` plans with them.

    Args:
        result: Of `gemm` or `bandwidth`.
    """
    from strixft.bench import bandwidth, gemm
    from strixft.guard.host import find_host

    version = f"torch {result.versions['torch']}"
    source = f"strixft bench {result.bench}, {result.started[:10]}, {version}"

    def sourced(value: float) -> Sourced:
        return Sourced(value=value, mark="measured", source=source)

    name = device_name(find_host("auto"))
    if result.bench == "bandwidth":
        return write_rates(name, bandwidth=sourced(bandwidth.copy_rate(result.rows)))
    rates = gemm.rates_by_dtype(result.rows)
    return write_rates(name, matmul={dtype: sourced(rate) for dtype, rate in rates.items()})


FLAGS = {
    "save": (True, typer.Option(help="Append the result to the local store.")),
    "host_row": (False, typer.Option("--host-row", help="Use the rates in plans for this host.")),
    "as_json": (False, typer.Option("--json", help="Print one JSON document.")),
}
"""Options of every bench: default and declaration. Only some benches have `host_row`."""


def bench_command(name: str, finish: Callable[..., None], **more: Any) -> Any:
    """Make the command of a bench, which passes its options to `finish`.

    Args:
        name: A row of `BENCHES`.
        finish: Takes the bench's name, its options, and the flags of every bench.
        **more: Annotations of further flags, off by default.

    Raises:
        RecipeError: There is no such bench.
    """
    bench = BENCHES[name]
    fields = bench.options.model_fields
    flags = {key: row for key, row in FLAGS.items() if key != "host_row" or bench.gives_rates}
    declared = {
        **{
            key: (row.default, Annotated[row.annotation, typer.Option(help=row.description)])
            for key, row in fields.items()
        },
        **{key: (default, Annotated[bool, option]) for key, (default, option) in flags.items()},
        **{key: (False, annotation) for key, annotation in more.items()},
    }

    def command(**given: Any) -> None:
        finish(name, {key: given[key] for key in fields}, **{key: given[key] for key in flags})

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (default, kind) in declared.items()
        ]
    )
    command.__annotations__ = {key: kind for key, (_, kind) in declared.items()}
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=inspect.getdoc(bench.options))(command)
    return typer.main.get_command(single)
