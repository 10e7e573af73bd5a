"""`published.csv`: figures of others with source and mark, each against its ceiling."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from strixft.bench.weights import (
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
"""How the settings of the first guide's table begin."""

REFERENCE = "v100-32"
"""The host that the others are compared with."""


Kind = Literal["decode", "prefill", "train_tok_per_s", "train_peak_gb", "train_seconds"]

MarkOfFigure = Literal["measured", "vendor", "claimed", "derived"]

RATES = ("decode", "prefill", "train_tok_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published figure."""

    figure: Kind
    model: str
    quantisation: str
    method: str
    """Of training; empty otherwise."""
    file_gb: float | None
    """10⁹ bytes, where the size of the very file is published."""
    host: str
    value: float | None
    """Tokens per second, GB or seconds; None where it does not run."""
    settings: str
    date: str
    source: str
    mark: MarkOfFigure

    @property
    def ceiling(self) -> Ceiling | None:
        """None for figures that are no rates."""
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
        """All weights go into the host's memory."""
        size = file_bytes(WEIGHTS[self.model], self.quantisation, self.file_gb)
        return size <= HOSTS[self.host].memory_bytes.value

    @property
    def verdict(self) -> Verdict | None:
        """None for figures that are no rates."""
        ceiling = self.ceiling
        return judge(self.value, ceiling, fits=self.fits) if ceiling else None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        ceiling, rate = self.ceiling, self.figure in RATES
        return {
            "figure": self.figure,
            "model": self.model,
            "quantisation": self.quantisation,
            **({"method": self.method} if self.method else {}),
            "host": self.host,
            "tok_per_s" if rate else "value": self.value,
            **(self._against(ceiling) if ceiling else {}),
            "mark": self.mark,
            "settings": self.settings,
            "date": self.date or None,
            "source": self.source,
        }

    def _against(self, ceiling: Ceiling) -> dict[str, Any]:
        share = None if self.value is None else round(ceiling.share(self.value), 4)
        return {
            "ceiling_tok_per_s": round(ceiling.tok_per_s, 2),
            "share": share,
            "verdict": self.verdict,
            "arithmetic": ceiling.arithmetic(self.value),
        }


def _number(where: str, row: Mapping[str, str], key: str) -> float | None:
    try:
        return float(row[key]) if row[key] else None
    except ValueError as error:
        raise DataError(
            f"{where}: {key} is no number: {row[key]!r}", fix="a number, or nothing"
        ) from error


def read_figures(lines: Iterable[str], name: str = FILE.name) -> Iterator[Figure]:
    """Figures of a CSV file.

    Args:
        lines: With a header.
        name: For errors.

    Raises:
        DataError: A row has no source or mark, or names a host or a model that is not known.
    """
    for number, row in enumerate(csv.DictReader(lines), start=2):
        where = f"{name}, line {number}"
        for key in ("source", "mark", "host", "model", "figure"):
            if not row.get(key):
                raise DataError(f"{where} has no {key}", fix=f"fill in {key}, or leave the row out")
        _refuse_unknown(where, row)
        yield Figure(
            figure=cast(Kind, row["figure"]),
            model=row["model"],
            quantisation=row["quantisation"],
            method=row["method"],
            file_gb=_number(where, row, "file_gb"),
            host=row["host"],
            value=_number(where, row, "value"),
            settings=row["settings"],
            date=row["date"],
            source=row["source"],
            mark=cast(MarkOfFigure, row["mark"]),
        )


def _refuse_unknown(where: str, row: Mapping[str, str]) -> None:
    known = {"figure": get_args(Kind), "mark": get_args(MarkOfFigure), "host": HOSTS}
    for key, words in {**known, "model": WEIGHTS}.items():
        if row[key] not in words:
            raise DataError(
                f"{where}: there is no {key} {row[key]!r}", fix=f"one of: {', '.join(words)}"
            )
    if not row["source"].startswith("https://"):
        raise DataError(f"{where}: the source is no address: {row['source']}", fix="https://…")


@cache
def figures() -> tuple[Figure, ...]:
    """The table that ships."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(read_figures(file))


def first_guide() -> list[Figure]:
    """The twelve cells of the first guide's table."""
    return [row for row in figures() if row.settings.startswith(FIRST_GUIDE)]


def reached_shares(host: str, *, sparse: bool) -> list[float]:
    """Shares of the ceiling that measured decoding reaches on a host, lowest first."""
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
    """A rate drawn between machines by the roofline; derived, not measured."""

    tok_per_s: float
    low: float
    high: float


def expect_decode(
    model: str, quantisation: str, host: str, file_gb: float | None = None
) -> Expected | None:
    """What a model should reach on a host: its ceiling × the shares that others reach there.

    Returns:
        By the median share, the lowest and the highest; None where nothing was measured.
    """
    weights = WEIGHTS[model]
    shares = reached_shares(host, sparse=weights.sparse)
    ceiling = decode_ceiling(HOSTS[host], read_bytes(weights, quantisation, file_gb))
    if not shares or ceiling is None:
        return None
    low, middle, high = shares[0], statistics.median(shares), shares[-1]
    top = ceiling.tok_per_s
    return Expected(top * middle, top * low, top * high)


def to_json(chosen: Iterable[Figure]) -> dict[str, Any]:
    """Figures by what they are of: `rows` are those of decoding."""
    kinds, listed = {"rows": "decode", "prefill": "prefill", "training": "train"}, list(chosen)
    return {
        name: [row.to_dict() for row in listed if row.figure.startswith(kind)]
        for name, kind in kinds.items()
    }


def choose(host: str = "", model: str = "") -> list[Figure]:
    """Figures of one host, or of models with a part in their name; all without.

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
