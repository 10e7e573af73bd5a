"""`Options` that a bench takes, `Measured` results that it gives, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from strixft.catalog.rates import FOLDER, data_folder
from strixft.support import html
from strixft.support.errors import HostError, RecipeError
from strixft.support.tables import did_you_mean
from strixft.support.units import format_figure

FORMAT = 1
"""Version of a stored line; a version that gives its keys other meanings adds one."""

MOST_COLUMNS = 12
"""Columns above which a table is shown with one column for each result."""

BELOW_TABLE = ("tokens", "load_s", "prompt_s", "prompt_tok_per_s", "decode_s", "total_s", "server")
"""Columns of a generation that are shown below the table instead of in it."""

BenchRow = dict[str, Any]
"""One result and what it was measured on: flat, with the same keys in all rows of a bench."""


class Options(BaseModel):
    """Options of a bench. Each field is an option of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rows of one bench and the circumstances under which they were measured."""

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
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `--json` and the store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Read the data that `to_dict` returned.

        Raises:
            ValueError: Another version wrote it.
        """
        if data.get("format") != FORMAT or set(data) != {field.name for field in fields(cls)}:
            raise ValueError(f"format {data.get('format')!r}, not {FORMAT}")
        return cls(**data)

    def table(self) -> tuple[list[list[str]], list[str]]:
        """Return cells and header; a table that would be too wide is transposed."""
        hidden = BELOW_TABLE if self._generated() else ()
        header = [key for key in (self.rows[0] if self.rows else ()) if key not in hidden]
        rows = [[format_figure(row.get(key)) for key in header] for row in self.rows]
        if len(header) <= MOST_COLUMNS:
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


def go_duration(seconds: float) -> str:
    """Format seconds as Ollama prints them.

    >>> go_duration(16.071996947), go_duration(0.0204), go_duration(75.5), go_duration(2e-6)
    ('16.071996947s', '20.4ms', '1m15.5s', '2µs')
    """
    if seconds < 1:
        scale, digits, unit = (1e6, 3, "µs") if seconds < 1e-3 else (1e3, 6, "ms")
        return f"{seconds * scale:.{digits}f}".rstrip("0").rstrip(".") + unit
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    return f"{int(minutes)}m{text}" if minutes else text


def verbose(row: BenchRow) -> str:
    """Format one row in the words of `ollama run --verbose`."""
    lines: dict[str, Any] = {
        "total duration": go_duration(row["total_s"]),
        "load duration": "–" if row["load_s"] is None else go_duration(row["load_s"]),
        "prompt eval count": f"{row['prompt_tokens']} token(s)",
        "prompt eval duration": go_duration(row["prompt_s"]),
        "prompt eval rate": f"{row['prompt_tok_per_s']:.2f} tokens/s",
        "eval count": f"{row['tokens']} token(s)",
        "eval duration": go_duration(row["decode_s"]),
        "eval rate": f"{row['tok_per_s']:.2f} tokens/s",
    }
    return "\n".join(f"{name + ':':<22}{value}" for name, value in lines.items())


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


def append(result: Measured) -> Path:
    """Append a result as one line, in one write."""
    require_store()
    path = store_file()
    line = json.dumps(result.to_dict(), ensure_ascii=False) + "\n"
    with path.open("a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last line was cut off; the next one starts afresh
                line = "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())
    return path


def read_store() -> Stored:
    """Read all results that this version understands, the oldest first."""
    path, stored = store_file(), Stored()
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            stored.results.append(Measured.from_dict(json.loads(line)))
        except (ValueError, AttributeError) as error:
            stored.left_out.append(f"{path}, line {number}: {error}")
    return stored
