"""`strixft bench WHAT`: what a bench is, its result, and the file that keeps results.

A bench is a class of `Bench` and a row of `BENCHES`: its fields become options of the command line.
"""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strixft.bench.timing import watched
from strixft.catalog.device_rates import FOLDER, cpu_name, data_folder, device_name, write_rates
from strixft.catalog.hosts import Sourced
from strixft.guard.sensors import read_sensors
from strixft.support import html
from strixft.support.errors import HostError, RecipeError
from strixft.support.files import now, versions
from strixft.support.tables import Table, did_you_mean
from strixft.support.units import format_figure

BenchRow = dict[str, Any]
"""One result and what it was measured on: flat, with the same keys in all rows of a bench."""


class Bench(BaseModel):
    """Something to measure; the docstring of each class is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    save: bool = Field(True, exclude=True, description="Append the result to the local store.")

    def measure(self) -> list[BenchRow]:
        """Measure."""
        raise NotImplementedError

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Check options.

        Raises:
            RecipeError: The bench has no such option, or a value is not allowed.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            fault = error.errors()[0]
            name = str(fault["loc"][0])
            if fault["type"] == "extra_forbidden":
                fix = did_you_mean(name, cls.model_fields)
                raise RecipeError(f"this bench has no option {name!r}", fix=fix) from error
            option, least = f"--{name.replace('_', '-')}", fault.get("ctx", {}).get("ge")
            raise RecipeError(
                f"{option} {given[name]}: {fault['msg'].lower()}",
                fix="strixft bench --help" if least is None else f"{option} {least:g}",
            ) from error


class RateBench(Bench):
    """A bench that measures rates of this host, with which planning can work."""

    host_row: bool = Field(False, exclude=True, description="Use the rates in plans for this host.")

    def rates(self, rows: list[BenchRow]) -> dict[str, float | dict[str, float]]:
        """Return rates a second by their names in `write_rates`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ListedBench:
    """A bench by its name."""

    name: str
    help: str
    """One line for `strixft bench --help`."""
    path: str
    """Module of this folder and class, imported on first use."""

    def load(self) -> type[Bench]:
        """Import the bench."""
        found: type[Bench] = pkgutil.resolve_name(f"strixft.bench.{self.path}")
        return found


BENCHES: Table[ListedBench] = Table(
    "bench",
    ListedBench("gemm", "matrix products in the layouts of training", "kernels:Gemm"),
    ListedBench("bandwidth", "memory bandwidth", "kernels:Bandwidth"),
    ListedBench("attention", "attention backends: correct or not, and time", "kernels:Attention"),
    ListedBench("train", "the training step, beside its plan and the product rate", "train:Train"),
    ListedBench("prefill", "reading of prompts, in process or by a server", "generate:Prefill"),
    ListedBench("decode", "generation, in process or by a server", "generate:Decode"),
    ListedBench("image", "images from a server, in seconds each", "image:Image"),
    ListedBench("data", "data preparation, beside TRL's", "data:Data"),
)
"""Everything that can be measured."""


class Measured(BaseModel):
    """Rows of one bench and the circumstances under which they were measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bench: str
    started: str
    seconds: float
    host: dict[str, Any]
    """Device, driver and system."""
    versions: dict[str, str]
    settings: dict[str, Any]
    conditions: dict[str, float]
    """Clock, temperature and power meanwhile, where the driver reports them."""
    rows: list[BenchRow]
    format: Literal[1] = 1
    """Version of a stored line; a version that gives its keys other meanings adds one."""

    def table(self) -> tuple[list[list[str]], list[str]]:
        """Return cells and header; a table of more than 12 columns is transposed."""
        hidden = BELOW_TABLE if self._generated() else ()
        header = [key for key in (self.rows[0] if self.rows else ()) if key not in hidden]
        rows = [[format_figure(row.get(key)) for key in header] for row in self.rows]
        if len(header) <= 12:
            return rows, header
        first, *others = zip(header, *rows, strict=True)
        return [list(line) for line in others], list(first)

    def summary(self) -> str:
        """Return one line that says where and when this was measured."""
        seen = ", ".join(f"{name} {value:g}" for name, value in self.conditions.items())
        return f"{self.bench} on {self.host['device']}, {self.started}" + (seen and f"; {seen}")

    def details(self) -> list[str]:
        """Return the texts below the table: generation in Ollama's words, then the summary."""
        shown = [f"{row['test']}, {row['variant']}\n{verbose(row)}" for row in self._generated()]
        return [*shown, self.summary()]

    def _generated(self) -> list[BenchRow]:
        return [row for row in self.rows if {"load_s", "decode_s", "prompt_s"} <= set(row)]

    def _repr_html_(self) -> str:
        return html.note(self.summary()) + html.table(*self.table())


BELOW_TABLE = ("tokens", "load_s", "prompt_s", "prompt_tok_per_s", "decode_s", "total_s", "server")
"""Columns of a generation that are shown below the table instead of in it."""


def go_duration(seconds: float | None) -> str:
    """Format seconds as Ollama prints them; unknown is a dash.

    >>> go_duration(16.071996947), go_duration(0.0204), go_duration(75.5), go_duration(2e-6)
    ('16.071996947s', '20.4ms', '1m15.5s', '2µs')
    """
    if seconds is None:
        return "–"
    if seconds < 1:
        scale, digits, unit = (1e6, 3, "µs") if seconds < 1e-3 else (1e3, 6, "ms")
        return f"{seconds * scale:.{digits}f}".rstrip("0").rstrip(".") + unit
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    return f"{int(minutes)}m{text}" if minutes else text


def verbose(row: BenchRow) -> str:
    """Format one row in the words of `ollama run --verbose`."""
    lines = {
        "total duration": go_duration(row["total_s"]),
        "load duration": go_duration(row["load_s"]),
        "prompt eval count": f"{row['prompt_tokens']} token(s)",
        "prompt eval duration": go_duration(row["prompt_s"]),
        "prompt eval rate": f"{row['prompt_tok_per_s']:.2f} tokens/s",
        "eval count": f"{row['tokens']} token(s)",
        "eval duration": go_duration(row["decode_s"]),
        "eval rate": f"{row['tok_per_s']:.2f} tokens/s",
    }
    return "\n".join(f"{name + ':':<22}{value}" for name, value in lines.items())


# Measure.


def _host(rows: list[BenchRow], device: str) -> dict[str, Any]:
    """Describe the device that did the work: a server's, or this machine's."""
    import torch

    servers = {row["server"] for row in rows if row.get("server")}
    if servers:
        name = ", ".join(sorted(servers))
    elif device == "cpu":
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    else:
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name} {getattr(properties, 'gcnArchName', '')}".strip()
    return {
        "device": name,
        "type": "server" if servers else device,
        "machine": platform.machine(),
        "system": platform.platform(),
    }


def run_bench(what: str, **settings: Any) -> Measured:
    """Measure, append the result to the local store, and let plans use the rates if asked to.

    Args:
        what: A row of `BENCHES`.
        **settings: Options of that bench.

    Raises:
        RecipeError: There is no such bench, or it has no such option.
        HostError: Results cannot be stored.
    """
    from strixft.guard.host import device_type, find_host  # torch, which `--help` does not need

    started, clock = now(), time.monotonic()
    bench = BENCHES[what].load().parse(settings)
    if bench.save:
        require_store()
    device = device_type()
    with watched(lambda: read_sensors(device)) as conditions:
        rows = bench.measure()
    result = Measured(
        bench=what,
        started=started,
        seconds=round(time.monotonic() - clock, 3),
        host=_host(rows, device),
        versions=versions(),
        settings=bench.model_dump(),
        conditions=conditions,
        rows=rows,
    )
    if bench.save:
        append(result)
    if isinstance(bench, RateBench) and bench.host_row:
        source = f"strixft bench {what}, {started[:10]}, torch {result.versions['torch']}"
        write_rates(device_name(find_host("auto")), **_sourced(bench.rates(rows), source))
    return result


def _sourced(rate: Any, source: str) -> Any:
    if isinstance(rate, dict):
        return {name: _sourced(one, source) for name, one in rate.items()}
    return Sourced(value=rate, mark="measured", source=source)


def bench_command(name: str, finish: Callable[..., None], **flags: Any) -> Any:
    """Make the command of a bench.

    Args:
        name: A row of `BENCHES`.
        finish: Takes the bench's name, its options, and the flags.
        **flags: Annotations of further options, off by default.

    Raises:
        RecipeError: There is no such bench.
    """
    bench = BENCHES[name].load()
    fields = sorted(bench.model_fields.items(), key=lambda item: item[0] in RateBench.model_fields)
    declared: dict[str, tuple[Any, Any]] = {
        key: (row.default, Annotated[row.annotation, typer.Option(help=row.description)])
        for key, row in fields
    } | {key: (False, annotation) for key, annotation in flags.items()}

    def command(**given: Any) -> None:
        finish(name, {key: given.pop(key) for key, _ in fields}, **given)

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (default, kind) in declared.items()
        ]
    )
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=inspect.getdoc(bench))(command)
    return typer.main.get_command(single)


# The store: one JSON line for each result, only ever appended to.


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents of the store."""

    results: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Lines that cannot be read, each with its number and the reason; the file keeps them."""


def store_file() -> Path:
    """Return the file to which results are appended."""
    return data_folder() / "bench.jsonl"


def require_store() -> None:
    """Check, before anything is measured, that results can be stored.

    Raises:
        HostError: They cannot.
    """
    path = store_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}",
            fix=f"--no-save, or another folder: export {FOLDER}=~/strixft-data",
        ) from error


def append(result: Measured) -> None:
    """Append a result as one line, in one write."""
    require_store()
    line = json.dumps(result.model_dump(), ensure_ascii=False) + "\n"
    with store_file().open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last line was cut off; the next one starts afresh
                line = "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())


def read_store() -> Stored:
    """Read all results that this version understands, the oldest first."""
    path, stored = store_file(), Stored()
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            stored.results.append(Measured.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]
            reason = ": ".join([*map(str, fault["loc"]), fault["msg"]])
            stored.left_out.append(f"{path}, line {number}: {reason}")
    return stored
