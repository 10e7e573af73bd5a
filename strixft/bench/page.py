"""`Benchmarks`: published figures and this machine's, as tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from strixft.bench.image import NOT_PUBLISHED
from strixft.bench.published import REFERENCE, Figure, expect_decode, figures, first_guide
from strixft.bench.roofline import FLOP_PER_TOKEN, WEIGHTS, compute_ceiling, file_bytes
from strixft.bench.run import Stored, read_store
from strixft.catalog.hosts import HOSTS
from strixft.catalog.models import MODELS
from strixft.model.architecture import multiplied_parameters
from strixft.model.source import load_config
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
from strixft.support import html
from strixft.support.html import Markup
from strixft.support.progress import progress_bar
from strixft.support.units import format_figure, format_number, format_seconds

SPARK = "dgx-spark"

COMPARED = (REFERENCE, "strix-halo-128", SPARK)

LETTERS = {"measured": "M", "vendor": "V", "claimed": "C", "derived": "D"}

KEY = (
    "Tokens per second of decoding. [M] measured by its source, [V] vendor's, [C] claimed, [D]"
    " derived here: the ceiling times the shares that measured models reach on that host, median"
    " and range. In parentheses: share of the ceiling."
)

SPARK_FORMATS = ("NVFP4", "FP4", "FP8")
"""Formats in which only the Spark multiplies: no rate is derived for the other hosts."""

RATE_HEADER = ["model", "host", "tokens/s", "ceiling", "share", "verdict", "settings", "source"]

TRAINING_HEADER = ["model", "method", "host", "GB", "time", "tokens/s", "share", "verdict", "mark"]

HEADER = ["recipe", "host", "GB", "a million tokens", "tokens/s", "share", "mark"]
"""Columns of `predict_training`."""

SHOWN = 120
"""Characters shown of the reason why a recipe could not be planned."""

Model = tuple[str, str, float | None]
"""Name, quantisation, size of the file in 10⁹ bytes."""


def compare_cell(model: Model, host: str) -> str:
    """Return the best measured rate of a model on a host, or the rate that the roofline allows."""
    name, quantisation, file_gb = model
    rows = [
        row
        for row in figures()
        if (row.figure, row.model, row.quantisation) == ("decode", name, quantisation)
        and (row.host, row.mark != "claimed") == (host, True)
    ]
    best = max(rows, key=lambda row: row.value or 0, default=None)
    if best and best.share is not None:
        return f"{best.value:g} [{LETTERS[best.mark]}] ({best.share:.2f})"
    size = file_bytes(WEIGHTS[name], quantisation, file_gb)
    if size > HOSTS[host].memory_bytes.value:
        return f"does not fit: {size / 1e9:.3g} GB"
    other = quantisation.startswith(SPARK_FORMATS) and host != SPARK
    expected = None if other else expect_decode(name, quantisation, host, file_gb)
    if expected is None:
        return "–"
    low, median, high = expected
    return f"≈ {median:.3g} ({low:.3g}–{high:.3g}) [D]"


def _source(url: str) -> Markup:
    host = url.removeprefix("https://").removeprefix("github.com/").partition("/")[0]
    return html.link(url, host)


class Point(NamedTuple):
    """A decode figure as a picture shows it."""

    host: str
    mark: str
    tok_per_s: float
    gb_per_token: float
    ceiling_tok_per_s: float | None


HERE = "this machine"

COLOURS = {"v100-32": "#64748b", "strix-halo-128": "#c2410c", SPARK: "#15803d", HERE: "#1d4ed8"}

MARKERS = {"measured": "o", "vendor": "s", "derived": "s", "claimed": "x"}


def _picture(figure: Any, points: Iterable[tuple[Point, float]], x: str, y: str) -> Markup:
    """Draw points by host (colour) and mark (marker) at a place on the x axis, and the scales."""
    (axes,), groups = figure.axes, dict[tuple[str, str], list[tuple[float, float]]]()
    for point, place in points:
        groups.setdefault(point[:2], []).append((place, point.tok_per_s))
    for (host, mark), places in sorted(groups.items()):
        marker, size = ("*", 110) if host == HERE else (MARKERS[mark], 26)
        style = {"color": COLOURS[host], "marker": marker, "s": size, "zorder": 3}
        axes.scatter(*zip(*places, strict=True), **style, label=f"{host}, {mark}")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=html.FAINT, linewidth=0.4)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return Markup(html.picture(figure, f"{y} over {x}"))


@dataclass(frozen=True)
class Benchmarks:
    """The figures that ship, beside this machine's results."""

    stored: Stored

    def _repr_html_(self) -> str:
        return self.compared()

    def compared(self) -> Markup:
        """Return models by host, the V100 first."""
        rows = [row for row in figures() if row.figure == "decode"]
        rows.sort(key=lambda row: COMPARED.index(row.host))
        found: dict[tuple[str, str], float | None] = {}
        for row in rows:
            if row.mark != "claimed" or row in first_guide():
                found.setdefault((row.model, row.quantisation), row.file_gb)
        cells = [
            [", ".join(name), *(compare_cell((*name, size), host) for host in COMPARED)]
            for name, size in found.items()
        ]
        return Markup(html.note(KEY) + html.table(cells, ["model", *COMPARED]))

    def roofline(self) -> Markup:
        """Draw every decode figure under its host's line, or above it."""
        figure, axes = html.new_figure(8.4, 4.4)
        points = self.points()
        ends = (min(1.0, *(point.gb_per_token for point in points)), 80.0)
        for host in COMPARED:
            if bus := HOSTS[host].bus_bytes_per_s:
                rates = [bus.value / 1e9 / gigabytes for gigabytes in ends]
                axes.plot(ends, rates, color=COLOURS[host], linewidth=1.2, label=f"{host}, at most")
        placed = [(point, point.gb_per_token) for point in points]
        return _picture(figure, placed, "GB of weights read for a token", "tokens/s, decoding")

    def against_ceiling(self) -> Markup:
        """Draw every decode figure against its ceiling; above the line it cannot be true."""
        figure, axes = html.new_figure(8.4, 4.4)
        ends = (1.0, 400.0)
        axes.plot(ends, ends, color=html.INK, linewidth=1.2)
        axes.fill_between(ends, ends, [1000, 1000], color="#fee2e2", zorder=0)
        axes.text(1.3, 250, "cannot be true", color="#b91c1c", fontsize=9)
        axes.set(xlim=ends, ylim=ends)
        placed = [(p, p.ceiling_tok_per_s) for p in self.points() if p.ceiling_tok_per_s]
        return _picture(figure, placed, "ceiling, tokens/s", "tokens/s as published")

    def points(self) -> list[Point]:
        """Return the decode figures of the pictures, this machine's last."""
        published = [
            Point(row.host, row.mark, row.value, ceiling.per_token / 1e9, ceiling.tok_per_s)
            for row in figures()
            if row.figure == "decode" and row.value and (ceiling := row.ceiling)
        ]
        keys = ("tok_per_s", "gb_per_token", "ceiling_tok_per_s")
        return published + [
            Point(HERE, "measured", *(row[key] for key in keys))
            for result in self.stored.results
            for row in result.rows
            if row.get("gb_per_token")
        ]

    def claims(self) -> Markup:
        """Return the first guide's table, cell by cell, with the arithmetic."""
        rows = [
            [
                *(row.model, row.host, format_figure(row.value), row.verdict or ""),
                row.ceiling.arithmetic(row.value) if row.ceiling else "",
                compare_cell((row.model, row.quantisation, row.file_gb), row.host),
            ]
            for row in first_guide()
        ]
        header = ["model", "host", "first guide", "verdict", "arithmetic", "instead"]
        return Markup(html.table(rows, header))

    def decode(self) -> Markup:
        """Return every published decode figure with its source."""
        return self._rates("decode")

    def prefill(self) -> Markup:
        """Return every published prefill figure with its source."""
        return self._rates("prefill")

    def _rates(self, kind: str) -> Markup:
        """Return rates as a table; this machine's stand first, highlighted."""
        here = list(self._rates_here(kind))
        published = [
            [
                f"{row.model}, {row.quantisation}",
                row.host,
                f"{format_figure(row.value)} [{LETTERS[row.mark]}]",
                format_figure(row.ceiling and row.ceiling.tok_per_s),
                format_figure(row.share),
                row.verdict or "",
                row.settings,
                _source(row.source),
            ]
            for row in figures()
            if row.figure == kind
        ]
        table = html.table(here + published, RATE_HEADER)
        return Markup(table.replace("<tr><td>", '<tr class="here"><td>', len(here)))

    def _rates_here(self, kind: str) -> Iterator[list[str]]:
        for result in self.stored.results:
            for row in result.rows if result.bench == kind else []:
                yield [
                    f"{row['model']}, {row['backend']}, {row['variant']}",
                    result.host["device"],
                    f"{format_figure(row['tok_per_s'])} [M]",
                    *(format_figure(row.get(key)) for key in ("ceiling_tok_per_s", "share")),
                    row.get("verdict") or "–",
                    row["test"],
                    f"strixft bench {kind}, {result.started[:10]}",
                ]

    def training(self) -> Markup:
        """Return published time and memory of training, and rates against the matrix units."""
        runs: dict[tuple[str, ...], dict[str, Figure]] = {}
        for row in figures():
            if row.figure.startswith("train_"):
                key = (row.model, row.method, row.host, row.source)
                runs.setdefault(key, {})[row.figure] = row
        rows = []
        for (*names, source), run in runs.items():
            first, rate = next(iter(run.values())), run.get("train_tok_per_s")
            peak, seconds = run.get("train_peak_gb"), run.get("train_seconds")
            memory = "–" if peak is None else format_figure(peak.value or "out of memory")
            rows.append(
                [
                    *(*names, memory, format_seconds(seconds.value if seconds else None)),
                    format_number(rate.value if rate else None, 0),
                    format_figure(rate and rate.share),
                    (rate and rate.verdict) or "",
                    *(LETTERS[first.mark], first.settings, _source(source)),
                ]
            )
        return Markup(html.table(rows, [*TRAINING_HEADER, "settings", "source"]))

    def here(self) -> Markup:
        """Return the results of this machine."""
        markup = "".join(html.warning(text) for text in self.stored.left_out)
        if not self.stored.results:
            return Markup(markup + html.note("Nothing was measured here yet: strixft bench decode"))
        latest = {(result.bench, result.host["device"]): result for result in self.stored.results}
        return Markup(markup + "".join(result._repr_html_() for result in latest.values()))

    def page(self) -> str:
        """Return all of it as one page of HTML."""
        parts = {
            "Compared with a V100": self.compared(),
            "The roofline": self.roofline(),
            "Claims against ceilings": self.against_ceiling(),
            "The first guide's table": self.claims(),
            "Decoding": self.decode(),
            "Prompts": self.prefill(),
            "Training": self.training(),
            "This machine": self.here(),
            "Images": html.note(NOT_PUBLISHED),
        }
        body = "".join(f"<h2>{title}</h2>{part}" for title, part in parts.items())
        lead = "Published figures with source and mark, each beside the most that memory allows."
        return html.page("Benchmarks", lead, body, width_rem=80)

    def write(self, path: str | Path) -> Path:
        """Write the page; see `html.write_page`."""
        return html.write_page(Path(path), self.page())


def open_benchmarks() -> Benchmarks:
    """Return the figures that ship and this machine's results."""
    return Benchmarks(read_store())


def _prediction(name: str, host: str) -> list[str]:
    recipe = load_recipe(name)
    try:
        found = plan_figures(recipe, host)
    except Exception as error:  # the other recipes' rows are still worth showing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [name, host, f"not planned: {reason[:SHOWN]}", *["–"] * (len(HEADER) - 3)]
    rate, share = found["tok_per_s"], None
    if recipe.model in MODELS and rate is not None:
        flop = FLOP_PER_TOKEN["full" if recipe.method == "full" else "adapter"]
        parameters = multiplied_parameters(load_config(recipe))
        ceiling = compute_ceiling(HOSTS[host], parameters, flop)
        share = ceiling and ceiling.share(rate)
    fits = "" if found["fits"] else ", does not fit"
    time = format_seconds(1e6 / rate if rate else None)
    figures = [f"{found['peak_bytes'] / 1e9:.1f}{fits}", time, format_number(rate, 0)]
    return [name, host, *figures, format_figure(share), "predicted"]


def predict_training(recipes: Iterable[str], host: str = "strix-halo-128") -> Markup:
    """Plan recipes for a host, about ten seconds each. Nothing is measured.

    Args:
        recipes: Names of recipes.
        host: A row of `HOSTS`.
    """
    rows = [_prediction(name, host) for name in progress_bar(list(recipes))]
    return Markup(html.table(rows, HEADER))
