"""Pictures of the roofline: figures over bytes read, and figures against their ceilings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from strixft import views
from strixft.bench.published import Figure
from strixft.hardware import HOSTS

COLOURS = {"v100-32": "#64748b", "strix-halo-128": "#c2410c", "dgx-spark": "#15803d"}
HERE = "#1d4ed8"
"""This machine."""
MARKERS = {"measured": "o", "vendor": "s", "derived": "s", "claimed": "x"}
LEAST_GB, MOST_GB = 1.0, 80.0


@dataclass(frozen=True, slots=True)
class Point:
    """One decode figure of this machine."""

    name: str
    gb_per_token: float
    tok_per_s: float
    ceiling_tok_per_s: float | None


def _drawn(rows: Iterable[Figure]) -> list[Figure]:
    return [row for row in rows if row.figure == "decode" and row.value and row.ceiling]


def _logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=views.FAINT, linewidth=0.4)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _mark_points(axes: Any, rows: Sequence[Figure], place: Any) -> None:
    """Every figure at its place: by colour the host, by marker what it is."""
    for host, colour in COLOURS.items():
        for mark, marker in MARKERS.items():
            chosen = [place(row) for row in rows if (row.host, row.mark) == (host, mark)]
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.scatter(
                    x, y, color=colour, marker=marker, s=26, zorder=3, label=f"{host}, {mark}"
                )


def _mark_here(axes: Any, places: Sequence[tuple[float, float]]) -> None:
    if places:
        x, y = zip(*places, strict=True)
        axes.scatter(x, y, color=HERE, marker="*", s=110, zorder=4, label="this machine, measured")


def draw_roofline(rows: Iterable[Figure], here: Sequence[Point]) -> str:
    """Tokens per second over bytes read for each; nothing can be above its host's line."""
    figure, axes = views.new_figure(8.4, 4.4)
    least = min([LEAST_GB, *(point.gb_per_token for point in here)])
    for host, colour in COLOURS.items():
        bus = HOSTS[host].bus_bytes_per_s
        if bus:
            ends = (least, MOST_GB)
            rates = [bus.value / 1e9 / gigabytes for gigabytes in ends]
            axes.plot(ends, rates, color=colour, linewidth=1.2, label=f"{host}, at most")
    drawn = _drawn(rows)
    _mark_points(axes, drawn, lambda row: (row.ceiling.per_token / 1e9, row.value))
    _mark_here(axes, [(point.gb_per_token, point.tok_per_s) for point in here])
    _logarithmic(axes, "GB of weights read for a token", "tokens/s, decoding")
    _legend(axes)
    return views.picture(figure, "tokens per second over bytes read, with each host's roofline")


def draw_against_ceiling(rows: Iterable[Figure], here: Sequence[Point]) -> str:
    """Figures against their ceilings: what is above the line cannot be true."""
    figure, axes = views.new_figure(8.4, 4.4)
    ends = (1.0, 400.0)
    axes.plot(ends, ends, color=views.INK, linewidth=1.2)
    axes.fill_between(ends, ends, [1000, 1000], color="#fee2e2", zorder=0)
    axes.text(1.3, 250, "cannot be true", color="#b91c1c", fontsize=9)
    drawn = _drawn(rows)
    _mark_points(axes, drawn, lambda row: (row.ceiling.tok_per_s, row.value))
    known = [point for point in here if point.ceiling_tok_per_s]
    _mark_here(axes, [(point.ceiling_tok_per_s or 0, point.tok_per_s) for point in known])
    _logarithmic(axes, "ceiling, tokens/s", "tokens/s as published")
    axes.set_ylim(1, 400)
    axes.set_xlim(*ends)
    _legend(axes)
    return views.picture(figure, "published figures against their ceilings")
