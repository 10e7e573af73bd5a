"""Published figures (`published.csv`) with source and mark, each against its ceiling."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from strixft.bench.roofline import (
    FLOP_PER_TOKEN,
    WEIGHTS,
    Ceiling,
    Verdict,
    compute_ceiling,
    decode_ceiling,
    file_bytes,
    judge,
    read_bytes,
)
from strixft.catalog.hosts import HOSTS
from strixft.support.errors import DataError, RecipeError
from strixft.support.tables import did_you_mean

FILE = Path(__file__).with_suffix(".csv")

FIRST_GUIDE = "first guide, table"
"""Start of the settings of each cell of the first guide's table."""

REFERENCE = "v100-32"
"""Host with which the others are compared."""


Kind = Literal["decode", "prefill", "train_tok_per_s", "train_peak_gb", "train_seconds"]

MarkOfFigure = Literal["measured", "vendor", "claimed", "derived"]

RATES = ("decode", "prefill", "train_tok_per_s")
"""Figures in tokens per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published figure."""

    figure: Kind
    model: str
    quantisation: str
    method: str
    """Training method; empty for other figures."""
    file_gb: float | None
    """Size of the very file in 10⁹ bytes, if published."""
    host: str
    value: float | None
    """Tokens per second, GB or seconds; None if the model does not run."""
    settings: str
    date: str
    source: str
    mark: MarkOfFigure

    @property
    def ceiling(self) -> Ceiling | None:
        """The highest possible value; None for a figure that is not a rate."""
        host, weights = HOSTS[self.host], WEIGHTS[self.model]
        if self.figure == "decode":
            return decode_ceiling(host, read_bytes(weights, self.quantisation, self.file_gb))
        if self.figure not in RATES:
            return None
        kind = "forward" if self.figure == "prefill" else "adapter"
        flop = FLOP_PER_TOKEN["full" if self.method == "full" else kind]
        return compute_ceiling(host, weights.read_parameters, flop)

    @property
    def fits(self) -> bool:
        """True if all weights fit into the host's memory."""
        size = file_bytes(WEIGHTS[self.model], self.quantisation, self.file_gb)
        return size <= HOSTS[self.host].memory_bytes.value

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None for a figure that is not a rate."""
        ceiling = self.ceiling
        return judge(self.value, ceiling, fits=self.fits) if ceiling else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        ceiling, against = self.ceiling, dict[str, Any]()
        if ceiling:
            share = None if self.value is None else round(ceiling.share(self.value), 4)
            against = {
                "ceiling_tok_per_s": round(ceiling.tok_per_s, 2),
                "share": share,
                "verdict": self.verdict,
                "arithmetic": ceiling.arithmetic(self.value),
            }
        return {
            "figure": self.figure,
            "model": self.model,
            "quantisation": self.quantisation,
            **({"method": self.method} if self.method else {}),
            "host": self.host,
            "tok_per_s" if self.figure in RATES else "value": self.value,
            **against,
            "mark": self.mark,
            "settings": self.settings,
            "date": self.date or None,
            "source": self.source,
        }


def _number(where: str, row: Mapping[str, str], key: str) -> float | None:
    try:
        return float(row[key]) if row[key] else None
    except ValueError as error:
        raise DataError(
            f"{where}: {key} is not a number: {row[key]!r}", fix="a number, or nothing"
        ) from error


def read_figures(lines: Iterable[str], name: str = FILE.name) -> Iterator[Figure]:
    """Read figures from the lines of a CSV file, the first of which is its header.

    Raises:
        DataError: A row has no source or mark, or names an unknown host or model.
    """
    known: dict[str, Iterable[str]] = {
        "figure": get_args(Kind),
        "mark": get_args(MarkOfFigure),
        "host": HOSTS,
        "model": WEIGHTS,
    }
    for number, row in enumerate(csv.DictReader(lines), start=2):
        where = f"{name}, line {number}"
        for key in ("source", "mark", "host", "model", "figure"):
            if not row.get(key):
                raise DataError(f"{where} has no {key}", fix=f"fill in {key}, or leave the row out")
        for key, words in known.items():
            if row[key] not in words:
                raise DataError(
                    f"{where}: there is no {key} {row[key]!r}", fix=f"one of: {', '.join(words)}"
                )
        if not row["source"].startswith("https://"):
            source = row["source"]
            raise DataError(f"{where}: the source is not an address: {source}", fix="https://…")
        yield Figure(
            **{key: row[key] for key in ("model", "quantisation", "method", "host", "settings")},
            **{key: row[key] for key in ("date", "source")},
            figure=cast(Kind, row["figure"]),
            mark=cast(MarkOfFigure, row["mark"]),
            file_gb=_number(where, row, "file_gb"),
            value=_number(where, row, "value"),
        )


@cache
def figures() -> tuple[Figure, ...]:
    """Return the figures that ship."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(read_figures(file))


def first_guide() -> list[Figure]:
    """Return the twelve cells of the first guide's table."""
    return [row for row in figures() if row.settings.startswith(FIRST_GUIDE)]


def reached_shares(host: str, *, sparse: bool) -> list[float]:
    """Return the shares of the ceiling that measured decoding reaches on a host, in order."""
    return sorted(
        row.ceiling.share(row.value)
        for row in figures()
        if row.figure == "decode"
        and (row.host, row.mark) == (host, "measured")
        and WEIGHTS[row.model].sparse is sparse
        and row.ceiling
        and row.value is not None
    )


@dataclass(frozen=True, slots=True)
class Expected:
    """A rate derived from the roofline, not measured."""

    tok_per_s: float
    low: float
    high: float


def expect_decode(
    model: str, quantisation: str, host: str, file_gb: float | None = None
) -> Expected | None:
    """Derive the rate of a model on a host: its ceiling × the shares that other models reach there.

    Returns:
        The rate by the median, lowest and highest share; None if nothing was measured there.
    """
    weights = WEIGHTS[model]
    shares = reached_shares(host, sparse=weights.sparse)
    ceiling = decode_ceiling(HOSTS[host], read_bytes(weights, quantisation, file_gb))
    if not shares or ceiling is None:
        return None
    top = ceiling.tok_per_s
    return Expected(top * statistics.median(shares), top * shares[0], top * shares[-1])


def to_json(chosen: Iterable[Figure]) -> dict[str, Any]:
    """Return figures by kind as plain data; `rows` are those of decoding."""
    kinds, listed = {"rows": "decode", "prefill": "prefill", "training": "train"}, list(chosen)
    return {
        name: [row.to_dict() for row in listed if row.figure.startswith(kind)]
        for name, kind in kinds.items()
    }


def choose(host: str = "", model: str = "") -> list[Figure]:
    """Return the figures of one host, of models whose name contains `model`, or all.

    Raises:
        RecipeError: There is no such host or model.
    """
    if host:
        HOSTS[host]
    words = model.lower()
    found = [row for row in figures() if words in row.model.lower() and host in ("", row.host)]
    if not found:
        names = {row.model for row in figures()}
        raise RecipeError(
            f"nothing is published here of {model or host!r}", fix=did_you_mean(model, names)
        )
    return found
