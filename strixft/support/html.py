"""Tables and pictures as HTML, for notebooks and for the report. All text is escaped."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strixft.support.errors import HostError
from strixft.support.text import typed, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, TUNED, BASE, FAINT = "#1f2933", "#c2410c", "#64748b", "#cbd5e1"
"""One colour a role: text, the tuned model, the base model, helper lines."""


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #cbd5e1 }
table.sx { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
tr.here { background: #dbeafe }
table.sx td, table.sx th { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid #e2e8f0; overflow-wrap: break-word }
table.sx td:first-child, table.sx th { white-space: nowrap }
img.sx { max-width: 100% } pre { background: #f1f5f9; padding: 1rem; overflow-x: auto }
.sx-warning { color: #b45309; font-weight: 600 } .lead { color: #64748b }
"""


def _shown(value: object) -> str:
    return escape(visible(str(value)))


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """An HTML table.

    >>> table([["a", "<b>"]])
    '<table class="sx"><tr><td>a</td><td>&lt;b&gt;</td></tr></table>'
    """
    head = "".join(f"<th>{_shown(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<table class="sx">{f"<tr>{head}</tr>" if head else ""}{body}</table>'


def mapping(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    return table(values.items())


def note(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{_shown(text)}</p>"


def warning(text: str) -> str:
    """A paragraph that should be seen."""
    return f'<p class="sx-warning">⚠ {_shown(text)}</p>'


def picture(figure: Figure, alt: str) -> str:
    """A matplotlib figure as an inline picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="sx" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def new_figure(width: float = 6.4, height: float = 2.8) -> tuple[Figure, Any]:
    """A small figure with one set of axes, drawn without a display. Inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    return figure, axes


START = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="strixft">'
)
"""What a page of ours begins with, and by which it is known."""


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(START)) == START.encode()


def _free_name(path: Path) -> Path:
    """The first of `page-2.html`, `page-3.html`, … that does not exist."""
    number = 2
    while (free := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return free


def _refuse_other(target: Path) -> None:
    """Raise where something else than a page of ours is, or no folder to write in."""
    if target.is_dir():
        raise HostError(f"{target} is a folder", fix=f"--page {target / 'page.html'}")
    if target.exists() and not (target.is_file() and _is_ours(target)):
        fix = f"--page {_free_name(target)}"
        raise HostError(f"{target} exists and is no page of strixft", fix=fix)
    if target.parent.exists() and not target.parent.is_dir():
        fix = f"--page {target.name}   writes it here"
        raise HostError(f"{target.parent} is no folder", fix=fix)
    if not target.parent.is_dir():
        fix = f"mkdir -p {target.parent}   and type it again"
        raise HostError(f"there is no folder {target.parent}", fix=fix)


def _write_by_rename(target: Path, html: str) -> None:
    """A page that is there stays whole until the new one is, and no half of one is left."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_page(path: Path, html: str) -> Path:
    """Write a page where a user wants it: over an older one of ours, and over nothing else.

    Args:
        path: Where; `~` is the home folder.
        html: What `page` gave.

    Raises:
        HostError: Another file is there, or the place cannot be written.
    """
    target = path.expanduser()
    try:
        _refuse_other(target)
        _write_by_rename(target, html)
    except OSError as error:
        raise HostError(
            f"{target} cannot be written: {error.strerror}",
            fix=f"ls -ld {typed(target.parent)}   shows whose it is;"
            " or --page and a file elsewhere",
        ) from error
    return target


def page(title: str, lead: str, body: str, width_rem: int = 60) -> str:
    """A page that stands alone.

    Args:
        title: Plain text.
        lead: Plain text below it.
        body: HTML.
        width_rem: Widest that it gets.
    """
    return (
        f"{START}<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body style="max-width: {width_rem}rem"><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p>{body}</body></html>\n'
    )
