"""`Benchmarks`: published figures and this machine's, as tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from strixft.bench.image import NOT_PUBLISHED
from strixft.bench.published import REFERENCE, Figure, expect_decode, figures, first_guide
from strixft.bench.result import Stored, read_store
from strixft.bench.roofline import FLOP_PER_TOKEN, WEIGHTS, compute_ceiling, file_bytes, weights_of
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


@dataclass(frozen=True)
class Html:
    """Markup that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


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
    if best is not None and best.value is not None and best.ceiling is not None:
        share = best.ceiling.share(best.value)
        return f"{best.value:g} [{LETTERS[best.mark]}] ({share:.2f})"
    size = file_bytes(WEIGHTS[name], quantisation, file_gb)
    if size > HOSTS[host].memory_bytes.value:
        return f"does not fit: {size / 1e9:.3g} GB"
    if quantisation.startswith(SPARK_FORMATS) and host != SPARK:
        return "–"
    expected = expect_decode(name, quantisation, host, file_gb)
    if expected is None:
        return "–"
    return f"≈ {expected.tok_per_s:.3g} ({expected.low:.3g}–{expected.high:.3g}) [D]"


def compared_models() -> list[Model]:
    """Return the models measured on at least one host or named by the first guide."""
    rows = [row for row in figures() if row.figure == "decode"]
    rows.sort(key=lambda row: COMPARED.index(row.host))
    found: dict[tuple[str, str], float | None] = {}
    for row in rows:
        if row.mark != "claimed" or row in first_guide():
            found.setdefault((row.model, row.quantisation), row.file_gb)
    return [(name, quantisation, size) for (name, quantisation), size in found.items()]


def _linked(rows: list[list[str]], header: list[str], here: int = 0) -> Html:
    """Make a table whose last column holds addresses.

    The first `here` rows are this machine's: they are highlighted and have no address.
    """
    cells = [[*row[:-1], f"@{number}@"] for number, row in enumerate(rows)]
    markup = html.table(cells, header).replace("<tr><td>", '<tr class="here"><td>', here)
    for number, row in enumerate(rows):
        url = row[-1]
        host = url.removeprefix("https://").removeprefix("github.com/").partition("/")[0]
        link = f'<a href="{escape(url, quote=True)}">{escape(host)}</a>'
        markup = markup.replace(f"@{number}@", escape(url) if number < here else link)
    return Html(markup)


def _share(row: Figure | None) -> str:
    """Format a figure as a share of its ceiling."""
    known = row is not None and row.ceiling is not None and row.value is not None
    return format_figure(row.ceiling.share(row.value) if known else None)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Benchmarks:
    """The figures that ship, beside this machine's results."""

    stored: Stored

    def _repr_html_(self) -> str:
        return self.compared().html

    def compared(self) -> Html:
        """Return models by host, the V100 first."""
        rows = [
            [f"{model[0]}, {model[1]}", *(compare_cell(model, host) for host in COMPARED)]
            for model in compared_models()
        ]
        return Html(html.note(KEY) + html.table(rows, ["model", *COMPARED]))

    def roofline(self) -> Html:
        """Draw every decode figure under its host's line, or above it."""
        return Html(draw_roofline(figures(), self.points()))

    def against_ceiling(self) -> Html:
        """Draw every decode figure against its ceiling."""
        return Html(draw_against_ceiling(figures(), self.points()))

    def claims(self) -> Html:
        """Return the first guide's table, cell by cell, with the arithmetic."""
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
        """Return every published decode figure with its source."""
        return self._rates("decode")

    def prefill(self) -> Html:
        """Return every published prefill figure with its source."""
        return self._rates("prefill")

    def _rates(self, kind: str) -> Html:
        here = list(self._rates_here(kind))
        published = [
            [
                f"{row.model}, {row.quantisation}",
                row.host,
                f"{format_figure(row.value)} [{LETTERS[row.mark]}]",
                format_figure(row.ceiling and row.ceiling.tok_per_s),
                _share(row),
                row.verdict or "",
                row.settings,
                row.source,
            ]
            for row in figures()
            if row.figure == kind
        ]
        return _linked(here + published, RATE_HEADER, len(here))

    def _rates_here(self, kind: str) -> Iterator[list[str]]:
        """Yield this machine's rows in the columns of the published ones."""
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

    def training(self) -> Html:
        """Return published time and memory of training, and rates against the matrix units."""
        runs: dict[tuple[str, ...], dict[str, Figure]] = {}
        for row in figures():
            if row.figure.startswith("train_"):
                key = (row.model, row.method, row.host, row.source)
                runs.setdefault(key, {})[row.figure] = row
        rows = []
        for (model, method, host, source), run in runs.items():
            first, rate = next(iter(run.values())), run.get("train_tok_per_s")
            peak, seconds = run.get("train_peak_gb"), run.get("train_seconds")
            memory = "–" if peak is None else format_figure(peak.value or "out of memory")
            rows.append(
                [
                    model,
                    method,
                    host,
                    memory,
                    format_seconds(seconds.value if seconds else None),
                    format_number(rate.value if rate else None, 0),
                    _share(rate),
                    (rate and rate.verdict) or "",
                    LETTERS[first.mark],
                    first.settings,
                    source,
                ]
            )
        return _linked(rows, [*TRAINING_HEADER, "settings", "source"])

    def here(self) -> Html:
        """Return the results of this machine."""
        markup = "".join(html.warning(text) for text in self.stored.left_out)
        if not self.stored.results:
            return Html(markup + html.note("Nothing was measured here yet: strixft bench decode"))
        latest = {(result.bench, result.host["device"]): result for result in self.stored.results}
        return Html(markup + "".join(result._repr_html_() for result in latest.values()))

    def points(self) -> list[Point]:
        """Return this machine's decode figures, for the pictures."""
        return [
            (row["gb_per_token"], row["tok_per_s"], row["ceiling_tok_per_s"])
            for result in self.stored.results
            for row in result.rows
            if row.get("gb_per_token")
        ]

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
            "Images": Html(html.note(NOT_PUBLISHED)),
        }
        body = "".join(f"<h2>{title}</h2>{part.html}" for title, part in parts.items())
        lead = "Published figures with source and mark, each beside the most that memory allows."
        return html.page("Benchmarks", lead, body, width_rem=80)

    def write(self, path: str | Path) -> Path:
        """Write the page; see `html.write_page`."""
        return html.write_page(Path(path), self.page())


def open_benchmarks() -> Benchmarks:
    """Return the figures that ship and this machine's results."""
    return Benchmarks(read_store())


# Pictures.

COLOURS = {"v100-32": "#64748b", "strix-halo-128": "#c2410c", "dgx-spark": "#15803d"}

HERE = "#1d4ed8"
"""Colour of this machine."""

MARKERS = {"measured": "o", "vendor": "s", "derived": "s", "claimed": "x"}

LEAST_GB, MOST_GB = 1.0, 80.0


Point = tuple[float, float, float | None]
"""One decode figure of this machine: GB a token, tokens per second, ceiling."""


def _mark_points(
    axes: Any,
    rows: Iterable[Figure],
    place: Callable[[Any], tuple[float, float]],
    here: Sequence[tuple[float, float]],
) -> None:
    """Draw decode figures by host (colour) and mark (marker), then this machine's."""
    drawn = [row for row in rows if row.figure == "decode" and row.value and row.ceiling]
    for host, colour in COLOURS.items():
        for mark, marker in MARKERS.items():
            places = [place(row) for row in drawn if (row.host, row.mark) == (host, mark)]
            style = {"color": colour, "marker": marker, "s": 26, "zorder": 3}
            if places:
                axes.scatter(*zip(*places, strict=True), **style, label=f"{host}, {mark}")
    if here:
        style = {"color": HERE, "marker": "*", "s": 110, "zorder": 4}
        axes.scatter(*zip(*here, strict=True), **style, label="this machine, measured")


def _finish(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=html.FAINT, linewidth=0.4)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def draw_roofline(rows: Iterable[Figure], here: Sequence[Point]) -> str:
    """Draw tokens per second over the bytes read for each, with the line of each host."""
    figure, axes = html.new_figure(8.4, 4.4)
    ends = (min([LEAST_GB, *(gigabytes for gigabytes, _, _ in here)]), MOST_GB)
    for host, colour in COLOURS.items():
        if bus := HOSTS[host].bus_bytes_per_s:
            rates = [bus.value / 1e9 / gigabytes for gigabytes in ends]
            axes.plot(ends, rates, color=colour, linewidth=1.2, label=f"{host}, at most")
    stars = [(gigabytes, rate) for gigabytes, rate, _ in here]
    _mark_points(axes, rows, lambda row: (row.ceiling.per_token / 1e9, row.value), stars)
    _finish(axes, "GB of weights read for a token", "tokens/s, decoding")
    return html.picture(figure, "tokens per second over bytes read, with each host's roofline")


def draw_against_ceiling(rows: Iterable[Figure], here: Sequence[Point]) -> str:
    """Draw figures against their ceilings; a figure above the line cannot be true."""
    figure, axes = html.new_figure(8.4, 4.4)
    ends = (1.0, 400.0)
    axes.plot(ends, ends, color=html.INK, linewidth=1.2)
    axes.fill_between(ends, ends, [1000, 1000], color="#fee2e2", zorder=0)
    axes.text(1.3, 250, "cannot be true", color="#b91c1c", fontsize=9)
    stars = [(ceiling, rate) for _, rate, ceiling in here if ceiling]
    _mark_points(axes, rows, lambda row: (row.ceiling.tok_per_s, row.value), stars)
    _finish(axes, "ceiling, tokens/s", "tokens/s as published")
    axes.set_ylim(1, 400)
    axes.set_xlim(*ends)
    return html.picture(figure, "published figures against their ceilings")


# Predictions.


def _prediction(name: str, host: str) -> list[Any]:
    recipe = load_recipe(name)
    try:
        figures = plan_figures(recipe, host)
    except Exception as error:  # the other recipes' rows are still worth showing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [name, host, f"not planned: {reason[:SHOWN]}", *["–"] * (len(HEADER) - 3)]
    rate, share = figures["tok_per_s"], None
    if recipe.model in MODELS and rate is not None:
        model = MODELS[recipe.model]
        flop = FLOP_PER_TOKEN["full" if recipe.method == "full" else "adapter"]
        parameters = weights_of(recipe.model, model.text_config, model.source).read_parameters
        ceiling = compute_ceiling(HOSTS[host], parameters, flop)
        share = ceiling and ceiling.share(rate)
    return [
        name,
        host,
        f"{figures['peak_bytes'] / 1e9:.1f}" + ("" if figures["fits"] else ", does not fit"),
        format_seconds(1e6 / rate if rate else None),
        format_number(rate, 0),
        format_figure(share),
        "predicted",
    ]


def predict_training(recipes: Iterable[str], host: str = "strix-halo-128") -> Html:
    """Plan recipes for a host, about ten seconds each. Nothing is measured.

    Args:
        recipes: Names of recipes.
        host: A row of `HOSTS`.
    """
    rows = [_prediction(name, host) for name in progress_bar(list(recipes))]
    return Html(html.table(rows, HEADER))
