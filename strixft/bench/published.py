"""Published figures (`published.csv`) with source and mark, each against its ceiling."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

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

RATES = ("decode", "prefill", "train_tok_per_s")
"""Figures in tokens per second."""


def _address(text: str) -> str:
    if not text.startswith("https://"):
        raise ValueError("should be an address, https://…")
    return text


Number = Annotated[float | None, BeforeValidator(lambda text: text or None)]


class Figure(BaseModel):
    """One published figure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    figure: Literal["decode", "prefill", "train_tok_per_s", "train_peak_gb", "train_seconds"]
    model: Annotated[str, AfterValidator(lambda name: WEIGHTS[name].name)]
    quantisation: str
    method: str
    """Training method; empty for other figures."""
    file_gb: Number
    """Size of the very file in 10⁹ bytes, if published."""
    host: Annotated[str, AfterValidator(lambda name: HOSTS[name].name)]
    value: Number
    """Tokens per second, GB or seconds; None if the model does not run."""
    settings: str
    date: str
    source: Annotated[str, AfterValidator(_address)]
    mark: Literal["measured", "vendor", "claimed", "derived"]

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
    def share(self) -> float | None:
        """The value as a share of its ceiling."""
        ceiling = self.ceiling
        return ceiling.share(self.value) if ceiling and self.value is not None else None

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None for a figure that is not a rate."""
        ceiling = self.ceiling
        if ceiling is None:
            return None
        size = file_bytes(WEIGHTS[self.model], self.quantisation, self.file_gb)
        return judge(self.value, ceiling, fits=size <= HOSTS[self.host].memory_bytes.value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        ceiling, against = self.ceiling, dict[str, Any]()
        if ceiling:
            against = {
                "ceiling_tok_per_s": round(ceiling.tok_per_s, 2),
                "share": None if self.share is None else round(self.share, 4),
                "verdict": self.verdict,
                "arithmetic": ceiling.arithmetic(self.value),
            }
        return {
            **self.model_dump(include={"figure", "model", "quantisation"}),
            **({"method": self.method} if self.method else {}),
            "host": self.host,
            "tok_per_s" if self.figure in RATES else "value": self.value,
            **against,
            "mark": self.mark,
            "settings": self.settings,
            "date": self.date or None,
            "source": self.source,
        }


def read_figures(lines: Iterable[str], name: str = FILE.name) -> Iterator[Figure]:
    """Read figures from the lines of a CSV file, the first of which is its header.

    Raises:
        DataError: A row has no source or mark, or names an unknown host or model.
    """
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            yield Figure.model_validate(row)
        except ValidationError as error:
            fault = error.errors()[0]
            key, where = str(fault["loc"][0]), f"{name}, line {number}"
            if not row.get(key):
                raise DataError(
                    f"{where} has no {key}", fix=f"fill in {key}, or leave the row out"
                ) from error
            own = fault.get("ctx", {}).get("error")
            if isinstance(own, RecipeError):  # a table has no such row
                problem, fix = own.problem, own.fix
            else:
                problem, fix = f"{key} cannot be {row[key]!r}", fault["msg"]
            raise DataError(f"{where}: {problem}", fix=fix) from error


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
        row.share
        for row in figures()
        if (row.figure, row.host, row.mark) == ("decode", host, "measured")
        and WEIGHTS[row.model].sparse is sparse
        and row.share is not None
    )


def expect_decode(
    model: str, quantisation: str, host: str, file_gb: float | None = None
) -> tuple[float, float, float] | None:
    """Derive the rate of a model on a host: its ceiling × the shares that other models reach there.

    Returns:
        Tokens per second by the lowest, median and highest share; None if nothing was measured
        there.
    """
    weights = WEIGHTS[model]
    shares = reached_shares(host, sparse=weights.sparse)
    ceiling = decode_ceiling(HOSTS[host], read_bytes(weights, quantisation, file_gb))
    if not shares or ceiling is None:
        return None
    top = ceiling.tok_per_s
    return top * shares[0], top * statistics.median(shares), top * shares[-1]


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
