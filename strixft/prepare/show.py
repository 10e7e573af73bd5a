"""Show prepared data from the figures alone; notebook and report show the same."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from strixft.support import html
from strixft.support.text import visible
from strixft.support.units import format_number

STYLES = {True: f"background:#ffedd5;color:{html.TUNED}", False: f"color:{html.BASE}"}
"""Style of tokens that are trained, and of masked ones."""

WORDS_OF_THINKING = {"train": "trained", "keep": "shown, not trained", "drop": "left out"}

BOX_STYLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #cbd5e1;padding:.6rem;"
    "max-height:24rem;overflow-y:auto;font:13px/1.5 ui-monospace,monospace;text-align:left"
)


def page(figures: Mapping[str, Any]) -> str:
    """Return the counts, warnings, problems, lengths and examples as HTML."""
    augmented = _augmented(figures["augment"]) if "augment" in figures else ""
    warnings = "".join(map(html.warning, figures["notes"]))
    problems = _kinds(figures["problems"], "rows to look at")
    return (
        _counts(figures) + augmented + warnings + problems + lengths(figures) + _examples(figures)
    )


def _counts(figures: Mapping[str, Any]) -> str:
    number, packing = format_number, figures["packing"]
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
    # a run of an older version names one end
    ends = figures.get("answer_ends", {}).get("texts", [figures.get("end_token")])
    return html.mapping(
        {
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
            **_thinking(figures),
            "an answer ends with": ", ".join(filter(None, ends)) or "nothing",
        }
    )


def _thinking(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the share of rows with reasoning; runs of older versions have none."""
    found = figures.get("thinking", {"rows": 0})
    if not found["rows"]:
        return {}
    share = f"{found['rows'] / found['of']:.0%}, {format_number(found['rows'])} rows"
    return {"rows with reasoning": f"{share}, {WORDS_OF_THINKING[found['as']]}"}


def _augmented(figures: Mapping[str, Any]) -> str:
    """Return the counts of rows that a server wrote, and why rows are not used."""
    where = " on the NPU" if figures["on_npu"] else ""
    counts = {
        "rows written by": f"{figures['model']}{where}, {figures['server']}",
        "task": figures["task"],
        "training rows sent": format_number(figures["rows_sent"]),
        "rows asked for": format_number(figures["rows_asked"]),
        "of these usable": format_number(figures["rows_kept"]),
        "of these trained": format_number(figures["rows_trained"]),
    }
    markup = "".join(map(html.warning, figures["warnings"])) + html.mapping(counts)
    return markup + _kinds(figures["refused"], "not used")


def _kinds(kinds: Mapping[str, Any], header: str) -> str:
    rows = []
    for kind, found in kinds.items():
        about = f"{kind.replace('_', ' ')}: {format_number(found['rows'])}"
        rows.append([", ".join(filter(None, [about, found.get("action")])), found["first"]])
    return html.table(rows, [header, "the first of them"]) if rows else ""


def lengths(figures: Mapping[str, Any]) -> str:
    """Return the histogram of the rows' lengths, with the cut, as a picture."""
    found, most = figures["lengths"], figures["packing"]["max_length"]
    figure, axes = html.new_figure()
    edges, width = found["edges"][:-1], found["edges"][1] - found["edges"][0]
    bars: dict[str, Any] = {"width": width * 0.92, "align": "edge"}
    axes.bar(edges, found["rows"], color=html.BASE, label="trained", **bars)
    long = found["too_long"]
    if any(long):
        axes.bar(edges, long, bottom=found["rows"], color=html.FAINT, label="too long", **bars)
    if most <= found["edges"][-1] * 1.5:
        axes.axvline(most, color=html.TUNED, linewidth=1.5, label=f"max_length {most}")
    else:
        axes.plot([], [], color=html.TUNED, label=f"max_length {most}, beyond the right edge")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False, fontsize=9)
    return html.picture(figure, "rows by their length in tokens")


def _examples(figures: Mapping[str, Any]) -> str:
    """Return rows from the shortest to the longest, masked and trained tokens in two colours."""
    markup = (
        f'<p>Rows as the model reads them: <span style="{STYLES[True]}">trained</span>,'
        f' <span style="{STYLES[False]}">masked</span>.</p>'
    )
    for row in figures["examples"]:
        part = f", part {row['part'] + 1}" if row["part"] else ""
        name = f"{row['file'].rpartition('/')[2]}, row {row['row']}{part}"
        count = f"{row['trained_tokens']} of {row['tokens']} tokens trained"
        if row["runs_left_out"]:
            count += f"; {row['runs_left_out']} stretches in the middle are not shown"
        runs = "".join(
            f'<bdi class="sx-{"trained" if trained else "masked"}" style="{STYLES[trained]}">'
            f"{escape(visible(text))}</bdi>"
            for text, trained in row["runs"]
        )
        # <pre> keeps the notebook from reading $…$ as a formula
        markup += html.note(f"{name}: {count}")
        markup += f'<pre class="sx-row" style="{BOX_STYLE}">{runs}</pre>'
    return markup
