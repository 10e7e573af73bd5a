"""What people see of prepared data, from the figures alone: notebook and report show the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from strixft.prepare import show
from strixft.prepare.augment import PROVENANCE, read_augmented
from strixft.support import html
from strixft.support.text import visible
from strixft.support.units import format_number

Figures = Mapping[str, Any]


TRAINED_STYLE = f"background:#ffedd5;color:{html.TUNED}"

MASKED_STYLE = f"color:{html.BASE}"

BOX_STYLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #cbd5e1;padding:.6rem;"
    "max-height:24rem;overflow-y:auto;font:13px/1.5 ui-monospace,monospace;text-align:left"
)


def summary(figures: Figures) -> str:
    """The counts as a table."""
    number = format_number
    packing = figures["packing"]
    tokens, trained = figures["tokens"], figures["trained_tokens"]
    left_out = {
        "bad rows, left out": figures["rows_bad"],
        "rows too long, left out": figures["rows_too_long"],
        "duplicates": figures["rows_duplicate"],
        "near duplicates": figures["rows_near_duplicate"],
        "rows left out on request": figures["rows_left_out"],
    }
    unused = [
        f"{name} ({number(count)} rows)" for name, count in figures.get("keys_unused", {}).items()
    ]
    shown = {
        "format": figures["format"],
        "loss on": figures["loss_on"],
        "rows read": number(figures["rows_read"]),
        "rows for training": number(figures["rows_train"]),
        "rows held out": number(figures["rows_validation"]),
        **{name: number(count) for name, count in left_out.items() if count},
        **({"keys not used": ", ".join(unused)} if unused else {}),
        "tokens for training": number(tokens),
        "of these trained": f"{number(trained)} ({trained / max(1, tokens):.0%})",
        "tokens read": number(figures["tokens_read"]),
        "longest row": f"{number(figures['longest_tokens'])} tokens",
        "fill, one chat in a row": f"{packing['fill_without']:.1%} of {packing['max_length']}",
        "fill, packed": f"{packing['fill']:.1%}, {number(packing['rows'])} rows",
        "an answer ends with": _ends(figures),
    }
    return html.mapping(shown)


def _ends(figures: Figures) -> str:
    """Every end; a run of an older version names one."""
    found = figures.get("answer_ends", {}).get("texts", [figures.get("end_token")])
    return ", ".join(filter(None, found)) or "nothing"


def warnings(figures: Figures) -> str:
    """What somebody should know before training."""
    return "".join(html.warning(text) for text in figures["notes"])


def problems(figures: Figures) -> str:
    """Each kind of problem: how many rows, what became of them, and the first."""
    rows = ""
    for kind, found in figures["problems"].items():
        words = f"{kind.replace('_', ' ')}: {format_number(found['rows'])}, {found['action']}"
        first = escape(visible(found["first"]))
        rows += f'<tr><td style="white-space:nowrap">{escape(words)}</td><td>{first}</td></tr>'
    head = "<tr><th>rows to look at</th><th>the first of them</th></tr>"
    return f'<table class="sx">{head}{rows}</table>' if rows else ""


def lengths(figures: Figures) -> str:
    """How long the rows are, with the cut."""
    found, most = figures["lengths"], figures["packing"]["max_length"]
    figure, axes = html.new_figure()
    edges, width = found["edges"][:-1], found["edges"][1] - found["edges"][0]
    bars: dict[str, Any] = {"width": width * 0.92, "align": "edge"}
    axes.bar(edges, found["rows"], color=html.BASE, label="trained", **bars)
    if any(found["too_long"]):
        axes.bar(
            edges,
            found["too_long"],
            bottom=found["rows"],
            color=html.FAINT,
            label="too long",
            **bars,
        )
    if most <= found["edges"][-1] * 1.5:
        axes.axvline(most, color=html.TUNED, linewidth=1.5, label=f"max_length {most}")
    else:
        axes.plot([], [], color=html.TUNED, label=f"max_length {most}, beyond the right edge")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False, fontsize=9)
    return html.picture(figure, "rows by their length in tokens")


def _runs(runs: list[Any]) -> Iterator[str]:
    for text, trained in runs:
        style = TRAINED_STYLE if trained else MASKED_STYLE
        kind = "sx-trained" if trained else "sx-masked"
        yield f'<bdi class="{kind}" style="{style}">{escape(visible(text))}</bdi>'


def examples(figures: Figures) -> str:
    """A few rows from the shortest to the longest, masked and trained tokens in two colours."""
    markup = (
        f'<p>Rows as the model reads them: <span style="{TRAINED_STYLE}">trained</span>,'
        f' <span style="{MASKED_STYLE}">masked</span>.</p>'
    )
    for row in figures["examples"]:
        part = f", part {row['part'] + 1}" if row["part"] else ""
        name = f"{row['file'].rpartition('/')[2]}, row {row['row']}{part}"
        count = f"{row['trained_tokens']} of {row['tokens']} tokens trained"
        if row["runs_left_out"]:
            count += f"; {row['runs_left_out']} stretches in the middle are not shown"
        # <pre> keeps the notebook from reading $…$ as a formula
        markup += html.note(f"{name}: {count}")
        markup += f'<pre class="sx-row" style="{BOX_STYLE}">{"".join(_runs(row["runs"]))}</pre>'
    return markup


def page(figures: Figures) -> str:
    """All of it."""
    return (
        summary(figures)
        + (show.summary(figures["augment"]) if "augment" in figures else "")
        + warnings(figures)
        + problems(figures)
        + lengths(figures)
        + examples(figures)
    )


SHOWN_ROWS = 10


def augmented_summary(figures: Mapping[str, Any]) -> str:
    """The counts, the warnings, and why rows are not used."""
    where = " on the NPU" if figures["on_npu"] else ""
    counts = {
        "rows written by": f"{figures['model']}{where}, {figures['server']}",
        "task": figures["task"],
        **{
            words: format_number(figures[name])
            for words, name in (
                ("training rows sent", "rows_sent"),
                ("rows asked for", "rows_asked"),
                ("of these usable", "rows_kept"),
                ("of these trained", "rows_trained"),
            )
        },
    }
    refused = [
        [f"{kind.replace('_', ' ')}: {format_number(found['rows'])}", found["first"]]
        for kind, found in figures["refused"].items()
    ]
    markup = "".join(map(html.warning, figures["warnings"])) + html.mapping(counts)
    return markup + (html.table(refused, ["not used", "the first of them"]) if refused else "")


@dataclass(frozen=True)
class AugmentedRows:
    """The first written rows with their source, for a notebook.

    Args:
        path: The file.
    """

    path: Path

    def rows(self) -> list[list[object]]:
        """File and row that a row comes from, its request and its answer."""
        return [
            [
                f"{Path(row[PROVENANCE]['source']).name}, row {row[PROVENANCE]['row']}",
                *(message["content"] for message in row["messages"][-2:]),
            ]
            for row in read_augmented(self.path, SHOWN_ROWS)
        ]

    def _repr_html_(self) -> str:
        return html.table(self.rows(), ["made of", "request", "answer"])
