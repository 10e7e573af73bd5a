"""Build tables, pictures and pages as HTML, for notebooks and reports; all text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strixft.support.errors import HostError
from strixft.support.files import write_text
from strixft.support.text import typed, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, TUNED, BASE, FAINT = "#1f2933", "#c2410c", "#64748b", "#cbd5e1"
"""One colour per role: text, the tuned model, the base model, helper lines."""


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


LEFT = "<style>table.sx td, table.sx th { text-align: left !important }</style>"
"""Goes before each table: JupyterLab aligns cells to the right, prose too."""


class Markup(str):
    """Text that is HTML already; a notebook shows it as such."""

    def _repr_html_(self) -> str:
        return str(self)


def link(url: str, text: str) -> Markup:
    """Build a link."""
    return Markup(f'<a href="{escape(url, quote=True)}">{_shown(text)}</a>')


def _shown(value: object) -> str:
    return value if isinstance(value, Markup) else escape(visible(str(value)))


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Build an HTML table.

    >>> table([["a", "<b>"]]).removeprefix(LEFT)
    '<table class="sx"><tr><td>a</td><td>&lt;b&gt;</td></tr></table>'
    """
    head = "".join(f"<th>{_shown(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'{LEFT}<table class="sx">{f"<tr>{head}</tr>" if head else ""}{body}</table>'


def mapping(values: Mapping[str, object]) -> str:
    """Build a table of names and values."""
    return table(values.items())


def note(text: str) -> str:
    """Build a paragraph of plain text."""
    return f"<p>{_shown(text)}</p>"


def warning(text: str) -> str:
    """Build a paragraph that stands out."""
    return f'<p class="sx-warning">⚠ {_shown(text)}</p>'


def picture(figure: Figure, alt: str) -> str:
    """Build an inline picture of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="sx" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def new_figure(width: float = 6.4, height: float = 2.8) -> tuple[Figure, Any]:
    """Return a figure of this size in inches, and its axes; it needs no display."""
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
"""First characters of our pages, which identify them."""


def _refuse_other(target: Path) -> None:
    """Raise if something other than a page of ours is there, or the folder does not exist."""
    folder = target.parent
    if target.is_dir():
        raise HostError(f"{target} is a folder", fix=f"--page {target / 'page.html'}")
    if target.exists():
        if target.is_file():
            with target.open("rb") as file:
                if file.read(len(START)) == START.encode():
                    return
        number = 2
        while (free := target.with_stem(f"{target.stem}-{number}")).exists():
            number += 1
        raise HostError(f"{target} exists and is not a page of strixft", fix=f"--page {free}")
    if folder.exists() and not folder.is_dir():
        fix = f"--page {target.name}   writes it here"
        raise HostError(f"{folder} is not a folder", fix=fix)
    if not folder.is_dir():
        fix = f"mkdir -p {typed(folder)}   and run the command again"
        raise HostError(f"there is no folder {folder}", fix=fix)


def write_page(path: Path, html: str) -> Path:
    """Write a page: over an older page of ours, and over nothing else.

    Args:
        path: The file; `~` is the home folder.
        html: The result of `page`.

    Raises:
        HostError: Another file is there, or the place cannot be written.
    """
    target = path.expanduser()
    try:
        _refuse_other(target)
        write_text(target, html)
    except OSError as error:
        raise HostError(
            f"{target} cannot be written: {error.strerror}",
            fix=f"ls -ld {typed(target.parent)}   shows whose it is; or --page and another file",
        ) from error
    return target


def page(title: str, lead: str, body: str, width_rem: int = 60) -> str:
    """Build a self-contained page.

    Args:
        title: Plain text.
        lead: Plain text below the title.
        body: HTML.
        width_rem: Largest width.
    """
    return (
        f"{START}<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body style="max-width: {width_rem}rem"><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p>{body}</body></html>\n'
    )
