"""A view of a run as one line of text, as lines for a terminal, and as HTML with its own pictures.

Pictures take the colour of the text around them, so that they fit a dark page too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from strixft.run.live import RESUMABLE, View
from strixft.support.files import now, write_text
from strixft.support.html import START
from strixft.support.text import visible
from strixft.support.units import format_gib, format_number, format_seconds, format_size

PAGE = "live.html"

BYTES = ("B", "iB")
"""Units of bars that count bytes, tqdm's and ours."""

REFRESH_S, REST_S = 3, 30
"""Seconds until the page loads itself again, while a stage works and while none does: another one
may follow, and a stopped run may be resumed."""

STYLE = """
.sx-live { font: 15px/1.45 system-ui, sans-serif; max-width: 46rem }
.sx-live h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
.sx-live ol { display: flex; flex-wrap: wrap; gap: .3rem 1rem; list-style: none; padding: 0;
  margin: 0 0 .8rem }
.sx-live li { opacity: .6 } .sx-live li.now { opacity: 1; font-weight: 600 }
.sx-live .sx-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .6rem 1rem; margin: .8rem 0 }
.sx-live .sx-name { font-size: .8rem; opacity: .75 }
.sx-live .sx-value { font-weight: 600; font-variant-numeric: tabular-nums }
.sx-live small { font-weight: 400 } .sx-live svg { width: 100%; height: auto; display: block }
.sx-live .sx-bar { height: .6rem; border: 1px solid currentColor; border-radius: .3rem;
  overflow: hidden }
.sx-live .sx-bar div { height: 100%; background: #c2410c }
.sx-live .sx-problem { border-left: 4px solid #c2410c; padding: .2rem .8rem; margin: .8rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere }
"""

PAGE_STYLE = """
:root { color-scheme: light dark } body { margin: 1.2rem auto; max-width: 46rem; padding: 0 1rem;
  color: #1f2933; background: #fff }
@media (prefers-color-scheme: dark) { body { color: #e2e8f0; background: #0f172a } }
"""


def _text(value: object) -> str:
    return escape(visible(str(value)))


def clock(seconds_from_now: float) -> str:
    """Return the local time of day so many seconds from now, with the day if it is another one."""
    then, today = datetime.fromtimestamp(time.time() + seconds_from_now), datetime.now()
    return then.strftime("%H:%M" if then.date() == today.date() else "%a %d %b %H:%M")


def _off(real: float | None, planned: float | None) -> str:
    return f"{real / planned - 1:+.0%}" if real and planned else ""


def figures(view: View) -> dict[str, tuple[str, str]]:
    """Return what is shown of a view: name → value and a remark."""
    found: dict[str, tuple[str, str]] = {}
    last, planned, host = view.last, view.planned, view.status.get("host") or {}
    if view.is_training:
        first = format_number(view.points[0].get("loss"))
        found["loss"] = format_number(last.get("loss")), f"first {first}"
        found |= _held_out(view)
        rate = last.get("learning_rate")
        found["learning rate"] = "–" if rate is None else f"{rate:.2e}", ""
        found["gradient norm"] = format_number(last.get("grad_norm")), ""
        rate, plan = last.get("tok_per_s"), planned.get("tok_per_s")
        off = f"plan {plan:,.0f}, {_off(rate, plan)}" if rate and plan else ""
        found["tokens/s"] = format_number(rate, 0), off
        if (reserved := last.get("reserved_bytes")) is not None:
            whole = planned.get("host", {}).get("budget_bytes")
            plan_gib = format_gib(planned.get("reserved_bytes"))
            found["memory"] = format_gib(reserved), f"plan {plan_gib}, budget {format_gib(whole)}"
        elif "resident_bytes" in last:
            found["process memory"] = format_gib(last["resident_bytes"]), ""
    if "left_bytes" in host:
        found["host memory left"] = format_gib(host["left_bytes"]), ""
    if "temperature_c" in host:
        found["temperature"] = f"{host['temperature_c']:.0f} °C", ""
    if "power_w" in host:
        found["power"] = f"{host['power_w']:.0f} W", ""
    found["elapsed"] = format_seconds(view.elapsed_s), ""
    if view.state == "running":
        ends = f"ends at {clock(view.left_s)}" if view.left_s is not None else ""
        found[_left_name(view)] = format_seconds(view.left_s), ends
    return found


def _left_name(view: View) -> str:
    """Return what the time left is of: of the stage, or of a part such as its weights' loading."""
    what = view.progress.get("what")
    return "time left" if what in (None, "", view.stage) else f"time left, {what}"


def _held_out(view: View) -> dict[str, tuple[str, str]]:
    """Return the newest losses on held-out rows and general texts, beside the lowest and first."""
    found: dict[str, tuple[str, str]] = {}
    known = [one for one in view.evaluations if one.get("held_out_loss") is not None]
    if known:
        lowest = min(known, key=lambda one: one["held_out_loss"])
        remark = f"lowest {lowest['held_out_loss']:.3f} at update {lowest['update']:,}"
        found["held-out loss"] = format_number(known[-1]["held_out_loss"]), remark
    general = [one for one in view.evaluations if one.get("general_loss") is not None]
    if general:
        remark = f"first {general[0]['general_loss']:.3f}"
        found["loss on general texts"] = format_number(general[-1]["general_loss"]), remark
    return found


def headline(view: View) -> str:
    """Return the stage, its state and its count in a few words."""
    words = f"{view.stage or 'run'}: {view.state}"
    progress = view.progress
    if view.state != "running" or progress.get("done") is None:
        return words
    what, unit = progress.get("what") or "", progress.get("unit") or "step"
    name = f"{what}, " if what and what != view.stage else ""
    return f"{words}, {name}{'' if unit in BYTES else f'{unit} '}{counted(progress)}"


def counted(progress: Mapping[str, Any]) -> str:
    """Return how far a bar is.

    >>> counted({"done": 7, "total": 1000}), counted({"done": 2**20, "total": 2**30, "unit": "B"})
    ('7 of 1,000', '1.0 MiB of 1.00 GiB')
    """
    done, total = progress.get("done") or 0, progress.get("total")
    shown = format_size if progress.get("unit") in BYTES else "{:,}".format
    return f"{shown(done)} of {shown(total)}" if total else shown(done)


def one_line(view: View) -> str:
    """Return a view as one line."""
    shown = figures(view)
    left = _left_name(view)
    kept = ("loss", "held-out loss", "tokens/s", "memory", "elapsed", left)
    parts = [f"{name} {shown[name][0]}" for name in kept if name in shown and shown[name][0] != "–"]
    if view.left_s is not None:
        parts.append(f"ends at {clock(view.left_s)}")
    return ", ".join([headline(view), *parts])


def lines(view: View) -> list[str]:
    """Return a view as lines of plain text."""
    done = [f"{stage} ✓" if is_done else stage for stage, is_done in view.stages.items()]
    width = max(map(len, figures(view)), default=0)
    found = [f"{view.name}   {' · '.join(done)}", headline(view)]
    found += [f"  {n:<{width}}  {v}  {r}".rstrip() for n, (v, r) in figures(view).items()]
    found += [f"  warning: {text}" for text in view.status.get("warnings") or ()]
    if view.status.get("problem") and view.state in RESUMABLE:
        found += [view.status["problem"], *_fix(view)]
    return [visible(line) for line in found]


def _fix(view: View) -> list[str]:
    return [f"fix: {view.status['fix']}"] if view.status.get("fix") else []


LINES = {
    "training loss": 'stroke="#c2410c" stroke-width="2"',
    "held-out loss": 'stroke="currentColor" stroke-width="2"',
    "general texts": 'stroke="currentColor" stroke-width="1.5" stroke-dasharray="5 4" opacity=".7"',
}
"""Strokes of the curves."""

Points = Sequence[tuple[float, float]]
"""x and y, in order of x."""


def loss_points(view: View) -> dict[str, Points]:
    """Return the losses of a training by update."""
    sources = {
        "training loss": ("loss", view.points),
        "held-out loss": ("held_out_loss", view.evaluations),
        "general texts": ("general_loss", view.evaluations),
    }
    found = {
        name: [
            (float(one["update"]), float(one[key])) for one in records if one.get(key) is not None
        ]
        for name, (key, records) in sources.items()
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def curves(lines: Mapping[str, Points]) -> str:
    """Return curves as SVG in the colour of the text, with a legend if there are several.

    Args:
        lines: Points by name, of `LINES`; at least two points each.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    width, height, left, bottom = 640, 180, 46, 22
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    tall = (high - low) or 1.0

    def down(y: float) -> float:
        return 8 + (high - y) / tall * (height - bottom - 16)

    def drawn(name: str) -> str:
        places = " ".join(
            f"{left + (x - first) / ((last - first) or 1) * (width - left - 8):.1f},{down(y):.1f}"
            for x, y in lines[name]
        )
        return f'<polyline points="{places}" fill="none" {LINES[name]}/>'

    marks = "".join(
        f'<text x="{left - 6}" y="{down(y) + 4:.0f}" text-anchor="end">{y:.2f}</text>'
        for y in (high, low)
    )
    ends = (
        f'<text x="{left}" y="{height - 4}">{first:,.0f}</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">{last:,.0f}</text>'
    )
    legend = _legend(lines) if len(lines) > 1 else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{_text(", ".join(lines))} by update"'
        f' font-size="12" fill="currentColor" font-family="system-ui, sans-serif">{marks}{ends}'
        f'<path d="M{left} 4V{height - bottom}H{width - 4}" fill="none" stroke="currentColor"'
        f' opacity=".4"/>{"".join(map(drawn, lines))}{legend}</svg>'
    )


def _legend(names: Iterable[str]) -> str:
    """Return the names of curves with their strokes, from the right edge of the picture."""
    return "".join(
        f'<path d="M{250 + 130 * index} 12h18" fill="none" {LINES[name]}/>'
        f'<text x="{272 + 130 * index}" y="16">{name}</text>'
        for index, name in enumerate(names)
    )


def to_html(view: View, as_typed: Callable[[str], str] = str) -> str:
    """Return a view as a piece of HTML; all text is escaped.

    Args:
        view: The view.
        as_typed: Returns a fix as it is typed where the view is shown.
    """
    stages = "".join(
        f"<li{' class=now' if stage == view.stage else ''}>{'✓' if is_done else '○'} {stage}</li>"
        for stage, is_done in view.stages.items()
    )
    total, done = view.progress.get("total"), view.progress.get("done") or 0
    bar = ""
    if view.state == "running" and total:
        share = min(1.0, done / total)
        bar = f'<div class="sx-bar"><div style="width: {share:.1%}"></div></div>'
    cells = "".join(
        f'<div><div class="sx-name">{_text(name)}</div><div class="sx-value">{_text(value)}'
        f" <small>{_text(remark)}</small></div></div>"
        for name, (value, remark) in figures(view).items()
    )
    picture = curves(loss_points(view)) if view.is_training else ""
    problems = [f"⚠ {text}" for text in view.status.get("warnings") or ()]
    if view.status.get("problem") and view.state in RESUMABLE:
        problems.append("\n".join([view.status["problem"], *map(as_typed, _fix(view))]))
    cards = "".join(f'<div class="sx-problem">{_text(text)}</div>' for text in problems)
    return (
        f'<div class="sx-live"><style>{STYLE}</style><h1>{_text(view.name)}</h1><ol>{stages}</ol>'
        f'<div>{_text(headline(view))}</div>{bar}<div class="sx-figures">{cells}</div>'
        f"{picture}{cards}</div>"
    )


def write_page(folder: Path, view: View) -> None:
    """Write `live.html`, which loads itself again."""
    after_s = REFRESH_S if view.state == "running" else REST_S
    again = f'<meta http-equiv="refresh" content="{after_s}">'
    text = (
        f'{START}<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{_text(view.name)}: {_text(view.state)}</title><style>{PAGE_STYLE}</style></head>"
        f'<body>{to_html(view)}<p class="sx-live"><small>as of {now()}</small></p></body></html>\n'
    )
    write_text(folder / PAGE, text, flush=False)
