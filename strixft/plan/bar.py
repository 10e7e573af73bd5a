"""Memory of a plan as a bar and its figures as a sentence, in the colours of the page around it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from strixft.plan.explore import Answer
from strixft.plan.show import sentence
from strixft.support.units import GIB, format_gib

PART_COLOURS = {
    "weights": "#3b6ea5",
    "adapter": "#5b8fc7",
    "gradients": "#7fa8d1",
    "optimizer": "#9dbde0",
    "activations": "#d9601f",
    "head": "#f0a030",
    "workspace": "#94a3b8",
    "held beyond": "#b6c2d1",
}
"""Readable on a light and on a dark page."""

STYLE = """
.sx-plan { font: 14px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);
  color: var(--jp-ui-font-color1, inherit) }
.sx-plan .sx-says { font-size: 1.15rem; font-weight: 600; margin: 0 0 .6rem; line-height: 1.35 }
.sx-plan .sx-says i { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .5em; background: #2e9e5b }
.sx-plan .sx-says.no i { background: #d64545 } .sx-plan .sx-says.guess i { background: #f0a030 }
.sx-plan .sx-says small { font-weight: 400; opacity: .75 }
.sx-plan .sx-room { position: relative; padding-top: 1.25rem; margin: 0 0 .5rem }
.sx-plan .sx-parts { display: flex; height: 1.5rem; border-radius: .35rem; overflow: hidden;
  background: color-mix(in srgb, currentColor 9%, transparent) }
.sx-plan .sx-parts div { min-width: 0; transition: width .15s }
.sx-plan .sx-mark { position: absolute; top: 0; bottom: -3px; border-left: 2px solid currentColor;
  white-space: nowrap; font-size: .8rem; line-height: 1 }
.sx-plan .sx-mark span { position: absolute; right: .35rem; top: 0; opacity: .8 }
.sx-plan .sx-key { display: flex; flex-wrap: wrap; gap: .15rem 1rem; font-size: .85rem;
  font-variant-numeric: tabular-nums }
.sx-plan .sx-key i { display: inline-block; width: .75em; height: .75em; border-radius: .15em;
  margin-right: .4em }
.sx-plan .sx-columns { display: flex; align-items: flex-end; gap: .4rem; height: 6.5rem;
  margin: 1rem 0 0; position: relative }
.sx-plan .sx-columns > div { flex: 1 1 0; max-width: 4.5rem; display: flex; flex-direction: column;
  justify-content: flex-end; height: 100%; text-align: center; font-size: .8rem }
.sx-plan .sx-columns b { display: block; background: #3b6ea5; border-radius: .2rem .2rem 0 0;
  min-height: 2px; opacity: .55 }
.sx-plan .sx-columns .over b { background: #d64545 } .sx-plan .sx-columns .now b { opacity: 1 }
.sx-plan .sx-columns .now { font-weight: 700 }
"""


def _says(answer: Answer) -> str:
    """Return memory, speed and time of some settings as one sentence."""
    return sentence(
        need_bytes=answer.need_bytes,
        budget_bytes=answer.budget_bytes,
        tok_per_s=answer.tok_per_s,
        seconds_per_update=answer.seconds_per_update,
        seconds_total=answer.seconds_total,
        about=not answer.is_exact,
    )


def bar(answer: Answer, choice: Answer | None = None) -> str:
    """Return the sentence and the memory bar of some settings as HTML.

    Args:
        answer: The settings' memory and time.
        choice: The plan's choice, which is marked in the bar if it is another one.
    """
    whole = 1.06 * max(answer.need_bytes, answer.budget_bytes)
    is_other = choice is not None and choice.settings != answer.settings
    marks = _mark(answer.budget_bytes / whole, f"budget {format_gib(answer.budget_bytes)}")
    marks += _mark(choice.need_bytes / whole, "plan ★") if choice and is_other else ""
    parts = {**answer.parts, "held beyond": answer.beyond_bytes}
    shown = {name: size for name, size in parts.items() if size > 0}
    pieces = "".join(
        f'<div style="width: {size / whole:.2%}; background: {PART_COLOURS[name]}"></div>'
        for name, size in shown.items()
    )
    key = "".join(
        f'<span><i style="background: {PART_COLOURS[name]}"></i>{name} {format_gib(size)}</span>'
        for name, size in shown.items()
        if size / whole > 0.002
    )
    kind = "" if answer.fits else "no"
    wait = "" if answer.is_exact else " <small>exact figures follow …</small>"
    return (
        f'<div class="sx-plan"><style>{STYLE}</style>'
        f'<p class="sx-says {kind}"><i></i>{escape(_says(answer))}{wait}</p>'
        f'<div class="sx-room" role="img" aria-label="{escape(_says(answer))}">{marks}'
        f'<div class="sx-parts">{pieces}</div></div><div class="sx-key">{key}</div></div>'
    )


def _mark(share: float, text: str) -> str:
    return f'<div class="sx-mark" style="left: {share:.2%}"><span>{escape(text)}</span></div>'


def columns(need_bytes: Mapping[int, int], budget_bytes: int, now: int, chosen: int) -> str:
    """Return the memory of each number of rows as columns; ★ marks the plan's choice.

    Args:
        need_bytes: Rows → memory.
        budget_bytes: The most that may be used.
        now: Rows that are set.
        chosen: Rows that the plan chose.
    """
    most = max(need_bytes.values())
    tallest = max(most, budget_bytes) if most > budget_bytes / 4 else most
    digits = 0 if most >= 20 * GIB else 1
    shown = ""
    for rows, need in need_bytes.items():
        kinds = ["over"] * (need > budget_bytes) + ["now"] * (rows == now)
        star = "★" if rows == chosen else ""
        shown += (
            f'<div class="{" ".join(kinds)}" title="{format_gib(need)}">{need / GIB:.{digits}f}'
            f'<b style="height: {75 * need / tallest:.0f}%"></b>{rows}{star}</div>'
        )
    return (
        '<div class="sx-plan"><div class="sx-columns" role="img" aria-label="memory by rows of a'
        f" micro-batch\">{shown}</div><small>GiB by rows of a micro-batch; ★ is the plan's choice"
        "</small></div>"
    )
