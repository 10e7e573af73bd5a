"""`Measured`: what every bench gives, and how it is shown."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from strixft.support import html
from strixft.support.units import format_figure

FORMAT = 1
"""Of a line in the store; a later version that means other things by its keys adds one."""


MOST_COLUMNS = 12
"""A table with more is shown with a column for each figure instead of a row."""


COUNTERS = ("tokens", "load_s", "prompt_s", "prompt_tok_per_s", "decode_s", "total_s", "server")
"""Columns that are shown below the table of a generation, not in it."""


Row = dict[str, Any]
"""One figure with what it was measured on: flat, the same keys in all rows of a bench."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rows of one bench, with all that is needed to read them later."""

    bench: str
    started: str
    seconds: float
    host: dict[str, Any]
    """Device, driver and system."""
    versions: dict[str, str]
    settings: dict[str, Any]
    conditions: dict[str, float]
    """Clock, temperature and power while it ran, where the driver tells."""
    rows: list[Row]
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_dict` gave.

        Raises:
            ValueError: It is of another version.
        """
        if data.get("format") != FORMAT or set(data) != {field.name for field in fields(cls)}:
            raise ValueError(f"format {data.get('format')!r}, not {FORMAT}")
        return cls(**data)

    def table(self) -> tuple[list[list[str]], list[str]]:
        """Rows of text, and their header; on its side where it would be too wide."""
        hidden = COUNTERS if self._generated() else ()
        header = [key for key in (self.rows[0] if self.rows else ()) if key not in hidden]
        rows = [[format_figure(row.get(key)) for key in header] for row in self.rows]
        if len(header) <= MOST_COLUMNS:
            return rows, header
        first, *others = zip(header, *rows, strict=True)
        return [list(line) for line in others], list(first)

    def says(self) -> str:
        """One line: where and when."""
        seen = ", ".join(f"{name} {value:g}" for name, value in self.conditions.items())
        return f"{self.bench} on {self.host['device']}, {self.started}" + (seen and f"; {seen}")

    def details(self) -> list[str]:
        """What stands under the table: generation in the words of Ollama, where and when."""
        shown = [f"{row['test']}, {row['variant']}\n{verbose(row)}" for row in self._generated()]
        return [*shown, self.says()]

    def _generated(self) -> list[Row]:
        return [row for row in self.rows if {"load_s", "decode_s", "prompt_s"} <= set(row)]

    def _repr_html_(self) -> str:
        rows, header = self.table()
        return html.note(self.says()) + html.table(rows, header)


def describe_host(device: str, name: str) -> dict[str, Any]:
    """What is written beside figures of a device.

    Args:
        device: `cuda`, `cpu`, or `server`.
        name: As the driver, the kernel or the server calls it.
    """
    return {
        "device": name,
        "type": device,
        "machine": platform.machine(),
        "system": platform.platform(),
    }


def go_duration(seconds: float) -> str:
    """Seconds as Ollama prints them.

    >>> go_duration(16.071996947), go_duration(0.0204), go_duration(75.5), go_duration(2e-6)
    ('16.071996947s', '20.4ms', '1m15.5s', '2µs')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3f}".rstrip("0").rstrip(".") + "µs"
    if seconds < 1:
        return f"{seconds * 1e3:.6f}".rstrip("0").rstrip(".") + "ms"
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    return f"{int(minutes)}m{text}" if minutes else text


def verbose(row: Row) -> str:
    """One row in the words of `ollama run --verbose`."""
    load = "–" if row["load_s"] is None else go_duration(row["load_s"])
    lines: dict[str, Any] = {
        "total duration": go_duration(row["total_s"]),
        "load duration": load,
        "prompt eval count": f"{row['prompt_tokens']} token(s)",
        "prompt eval duration": go_duration(row["prompt_s"]),
        "prompt eval rate": f"{row['prompt_tok_per_s']:.2f} tokens/s",
        "eval count": f"{row['tokens']} token(s)",
        "eval duration": go_duration(row["decode_s"]),
        "eval rate": f"{row['tok_per_s']:.2f} tokens/s",
    }
    return "\n".join(f"{name + ':':<22}{value}" for name, value in lines.items())
