"""`Benchmarks`: published figures and this machine's, as tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from strixft.bench.image import NOT_PUBLISHED
from strixft.bench.published import REFERENCE, Figure, expect_decode, figures, first_guide
from strixft.bench.store import Stored, read_store
from strixft.bench.weights import FLOP_PER_TOKEN, WEIGHTS, compute_ceiling, file_bytes, weights_of
from strixft.catalog.hosts import HOSTS
from strixft.catalog.models import MODELS
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
from strixft.support import html
from strixft.support.progress import progress_bar
from strixft.support.units import format_figure, format_number, format_seconds

SPARK = "dgx-spark"

COMPARED = (REFERENCE, "strix-halo-128", SPARK)

LETTERS = {"measured": "M", "vendor": "V", "claimed": "C", "derived": "D"}

KEY = (
    "Tokens per second of decoding. [M] measured by its source, [V] vendor's, [C] claimed, [D]"
    " derived here: the ceiling times the shares that measured models reach on that host, median"
    " and range. In brackets: share of the ceiling."
)

SPARK_FORMATS = ("NVFP4", "FP4", "FP8")
"""Formats that only the Spark of these hosts multiplies in: no figure is drawn to another."""

Model = tuple[str, str, float | None]
"""Name, quantisation, size of the file in GB."""


@dataclass(frozen=True)
class Html:
    """Something that shows itself in a notebook."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def _best(rows: Sequence[Figure], host: str) -> Figure | None:
    """The highest of the figures that are not mere claims."""
    found = [row for row in rows if row.host == host and row.mark != "claimed"]
    return max(found, key=lambda row: row.value or 0, default=None)


def _same_weights(model: Model) -> list[Figure]:
    name, quantisation, _ = model
    return [
        row
        for row in figures()
        if (row.figure, row.model, row.quantisation) == ("decode", name, quantisation)
    ]


def compare_cell(model: Model, host: str) -> str:
    """A model on a host: what was measured, else what the roofline lets expect."""
    best, size = _best(_same_weights(model), host), file_bytes(WEIGHTS[model[0]], *model[1:])
    if best is not None and best.value is not None and best.ceiling is not None:
        share = best.ceiling.share(best.value)
        return f"{best.value:g} [{LETTERS[best.mark]}] ({share:.2f})"
    if size > HOSTS[host].memory_bytes.value:
        return f"does not fit: {size / 1e9:.3g} GB"
    if model[1].startswith(SPARK_FORMATS) and host != SPARK:
        return "–"
    expected = expect_decode(model[0], model[1], host, model[2])
    if expected is None:
        return "–"
    return f"≈ {expected.tok_per_s:.3g} ({expected.low:.3g}–{expected.high:.3g}) [D]"


def compared_models() -> list[Model]:
    """Models with a measured figure on one host at least, or in the first guide; V100's first."""
    rows = [row for row in figures() if row.figure == "decode"]
    rows.sort(key=lambda row: COMPARED.index(row.host))
    named = [row for row in rows if row.mark != "claimed" or row in first_guide()]
    found: dict[tuple[str, str], float | None] = {}
    for row in named:
        found.setdefault((row.model, row.quantisation), row.file_gb)
    return [(name, quantisation, size) for (name, quantisation), size in found.items()]


def _link(url: str) -> str:
    short = url.removeprefix("https://").removeprefix("github.com/")
    return f'<a href="{escape(url, quote=True)}">{escape(short.partition("/")[0])}</a>'


def _linked(rows: list[list[str]], header: list[str], here: int = 0) -> str:
    """A table whose last column is an address.

    Args:
        rows: Cells.
        header: Names of the columns.
        here: So many of the first rows are this machine's: they stand out, without an address.
    """
    cells = [[*row[:-1], f"@{number}@"] for number, row in enumerate(rows)]
    markup = html.table(cells, header).replace("<tr><td>", '<tr class="here"><td>', here)
    for number, row in enumerate(rows):
        markup = markup.replace(f"@{number}@", escape(row[-1]) if number < here else _link(row[-1]))
    return markup


def _rate_cells(row: Figure) -> list[str]:
    ceiling = row.ceiling
    share = ceiling.share(row.value) if ceiling and row.value is not None else None
    return [
        f"{row.model}, {row.quantisation}",
        row.host,
        f"{format_figure(row.value)} [{LETTERS[row.mark]}]",
        format_figure(ceiling and ceiling.tok_per_s),
        format_figure(share),
        row.verdict or "",
        row.settings,
        row.source,
    ]


@dataclass(frozen=True)
class Benchmarks:
    """The tables that ship, and what was measured here.

    Args:
        stored: This machine's results.
    """

    stored: Stored

    def _repr_html_(self) -> str:
        return self.compared().html

    def compared(self) -> Html:
        """Models by host, the V100 first."""
        rows = [
            [
                f"{name}, {quantisation}",
                *(compare_cell((name, quantisation, size), host) for host in COMPARED),
            ]
            for name, quantisation, size in compared_models()
        ]
        return Html(html.note(KEY) + html.table(rows, ["model", *COMPARED]))

    def roofline(self) -> Html:
        """Every decode figure under its host's line, or above it."""
        return Html(draw_roofline(figures(), self.points()))

    def against_ceiling(self) -> Html:
        """Every decode figure against its ceiling."""
        return Html(draw_against_ceiling(figures(), self.points()))

    def claims(self) -> Html:
        """The first guide's table, cell by cell, with the arithmetic."""
        rows = [
            [
                row.model,
                row.host,
                format_figure(row.value),
                row.verdict or "",
                row.ceiling.arithmetic(row.value) if row.ceiling else "",
                compare_cell((row.model, row.quantisation, row.file_gb), row.host),
            ]
            for row in first_guide()
        ]
        header = ["model", "host", "first guide", "verdict", "arithmetic", "instead"]
        return Html(html.table(rows, header))

    def decode(self) -> Html:
        """Every published decode figure with its source."""
        return self._rates("decode")

    def prefill(self) -> Html:
        """Every published prompt rate with its source."""
        return self._rates("prefill")

    def _rates(self, kind: str) -> Html:
        here = list(self._rates_here(kind))
        rows = [_rate_cells(row) for row in figures() if row.figure == kind]
        return Html(_linked(here + rows, RATES, len(here)))

    def _rates_here(self, kind: str) -> Iterator[list[str]]:
        """This machine's rows in the columns of the published ones."""
        for result in self.stored.results:
            for row in result.rows if result.bench == kind else []:
                shown = [format_figure(row.get(key)) for key in ("ceiling_tok_per_s", "share")]
                yield [
                    f"{row['model']}, {row['backend']}, {row['variant']}",
                    result.host["device"],
                    f"{format_figure(row['tok_per_s'])} [M]",
                    *shown,
                    row.get("verdict") or "–",
                    row["test"],
                    f"strixft bench {kind}, {result.started[:10]}",
                ]

    def training(self) -> Html:
        """Published time and memory of training, and rates against the matrix units."""
        return Html(_linked(list(_training_rows()), [*TRAINING, "settings", "source"]))

    def here(self) -> Html:
        """What was measured on this machine."""
        markup = "".join(html.warning(text) for text in self.stored.left_out)
        if not self.stored.results:
            return Html(markup + html.note("Nothing was measured here yet: strixft bench decode"))
        latest = {(result.bench, result.host["device"]): result for result in self.stored.results}
        return Html(markup + "".join(result._repr_html_() for result in latest.values()))

    def points(self) -> list[Point]:
        """This machine's decode figures, for the pictures."""
        rows = [row for result in self.stored.results for row in result.rows]
        return [
            Point(row["model"], row["gb_per_token"], row["tok_per_s"], row["ceiling_tok_per_s"])
            for row in rows
            if row.get("gb_per_token")
        ]

    def page(self) -> str:
        """All of it as one page of HTML."""
        parts = {
            "Compared with a V100": self.compared(),
            "The roofline": self.roofline(),
            "Claims against ceilings": self.against_ceiling(),
            "The first guide's table": self.claims(),
            "Decoding": self.decode(),
            "Prompts": self.prefill(),
            "Training": self.training(),
            "This machine": self.here(),
            "Images": Html(html.note(NOT_PUBLISHED)),
        }
        body = "".join(f"<h2>{title}</h2>{part.html}" for title, part in parts.items())
        lead = "Published figures with source and mark, each beside what memory allows at most."
        return html.page("Benchmarks", lead, body, width_rem=80)

    def write(self, path: str | Path) -> Path:
        """Write the page; see `views.write_page`."""
        return html.write_page(Path(path), self.page())


RATES = ["model", "host", "tokens/s", "ceiling", "share", "verdict", "settings", "source"]

TRAINING = ["model", "method", "host", "GB", "time", "tokens/s", "share", "verdict", "mark"]


def _training_rows() -> Iterator[list[str]]:
    """Figures of one run beside each other."""
    runs: dict[tuple[str, ...], dict[str, Figure]] = {}
    for row in figures():
        if row.figure.startswith("train_"):
            key = (row.model, row.method, row.host, row.source)
            runs.setdefault(key, {})[row.figure] = row
    for (model, method, host, source), found in runs.items():
        first, rate = next(iter(found.values())), found.get("train_tok_per_s")
        yield [
            model,
            method,
            host,
            *_run_cells(found, rate),
            LETTERS[first.mark],
            first.settings,
            source,
        ]


def _run_cells(found: dict[str, Figure], rate: Figure | None) -> list[str]:
    peak, seconds = found.get("train_peak_gb"), found.get("train_seconds")
    memory = "–" if peak is None else "out of memory" if peak.value is None else f"{peak.value:g}"
    share = rate.ceiling.share(rate.value) if rate and rate.ceiling and rate.value else None
    return [
        memory,
        format_seconds(seconds.value if seconds else None),
        format_number(rate.value if rate else None, 0),
        format_figure(share),
        (rate and rate.verdict) or "",
    ]


def open_benchmarks() -> Benchmarks:
    """The tables that ship, and this machine's own results."""
    return Benchmarks(read_store())


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
    axes.grid(color=html.FAINT, linewidth=0.4)


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
    figure, axes = html.new_figure(8.4, 4.4)
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
    return html.picture(figure, "tokens per second over bytes read, with each host's roofline")


def draw_against_ceiling(rows: Iterable[Figure], here: Sequence[Point]) -> str:
    """Figures against their ceilings: what is above the line cannot be true."""
    figure, axes = html.new_figure(8.4, 4.4)
    ends = (1.0, 400.0)
    axes.plot(ends, ends, color=html.INK, linewidth=1.2)
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
    return html.picture(figure, "published figures against their ceilings")


SHOWN = 120
"""Characters of the reason for which a recipe could not be planned."""

HEADER = ["recipe", "host", "GB", "a million tokens", "tokens/s", "share", "mark"]


def _share(model: str, method: str, host: str, tok_per_s: float | None) -> float | None:
    """Of the host's matrix rate."""
    if model not in MODELS or tok_per_s is None:
        return None
    weights = weights_of(model, MODELS[model].sides, MODELS[model].source)
    flop = FLOP_PER_TOKEN["full" if method == "full" else "adapter"]
    ceiling = compute_ceiling(HOSTS[host], weights.read_parameters, flop)
    return ceiling.share(tok_per_s) if ceiling else None


def _row(name: str, host: str) -> list[Any]:
    recipe = load_recipe(name)
    try:
        figures = plan_figures(recipe, host)
    except Exception as error:  # the other recipes' rows are still worth showing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [name, host, f"not planned: {reason[:SHOWN]}", *["–"] * (len(HEADER) - 3)]
    rate = figures["tok_per_s"]
    memory = f"{figures['peak_bytes'] / 1e9:.1f}" + ("" if figures["fits"] else ", does not fit")
    return [
        name,
        host,
        memory,
        format_seconds(1e6 / rate if rate else None),
        format_number(rate, 0),
        format_figure(_share(recipe.model, recipe.method, host, rate)),
        "predicted",
    ]


def predict_training(recipes: Iterable[str], host: str = "strix-halo-128") -> Html:
    """Plan recipes for a host; some ten seconds each. Nothing of it is measured.

    Args:
        recipes: Their names.
        host: A row of `HOSTS`.
    """
    rows = [_row(name, host) for name in progress_bar(list(recipes))]
    return Html(html.table(rows, HEADER))
