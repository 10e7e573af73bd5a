"""The end of a run in a notebook: a verdict, the report, a conversation, exports."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from strixft.app.chat_box import ChatBox
from strixft.app.export_box import ExportBox
from strixft.app.links import file_link, widget_link
from strixft.app.report import write_report
from strixft.evaluate.stage import Evaluated
from strixft.evaluate.verdict import forgotten, verdict
from strixft.run.folder import Run
from strixft.run.open import find_run
from strixft.run.show import PAGE
from strixft.support import html
from strixft.support.environment import in_live_notebook
from strixft.support.text import typed

STYLE = """
.sx-finish { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; padding: .6rem 1rem;
  border: 1px solid rgba(120, 130, 150, .35); border-left: 4px solid #c2410c; margin: .6rem 0 }
.sx-finish p { margin: .2rem 0; overflow-wrap: anywhere }
.sx-finish .sx-verdict { font-size: 1.1rem; font-weight: 600 }
"""


def sentences(run: Run) -> list[str]:
    """Return the verdict on a run and what it forgot; nothing before it is evaluated."""
    evaluated = Evaluated.load(run.stage_folder("evaluate"))
    if evaluated is None:
        return []
    return list(filter(None, (verdict(evaluated.figures), forgotten(evaluated.figures))))


def next_commands(run: Run) -> list[str]:
    """Return what to type after a training, as short as the working folder allows."""
    here = Path.cwd()
    near = run.folder.is_relative_to(here) and run.folder != here
    folder = typed(run.folder.relative_to(here) if near else run.folder)
    export = f"strixft export {folder} --to"
    return [f"strixft chat {folder} --both", f"{export} q4_k_m", f"{export} ollama"]


def finish_html(run: Run, *, in_widget: bool = True) -> str:
    """Return the verdict and links to the report and the live page as HTML.

    Args:
        run: The run.
        in_widget: It is shown by a widget, not by an output of a cell.
    """
    link = widget_link if in_widget else file_link
    said = sentences(run)
    if not said:
        return html.note(f"{run.name} is not evaluated yet.")
    first, *rest = map(escape, said)
    report = link(write_report(run), "report")
    page = run.folder / PAGE
    links = f"{report} · {link(page, 'how it went')}" if page.is_file() else report
    more = "".join(f"<p>{text}</p>" for text in rest)
    return (
        f'<div class="sx-finish"><style>{STYLE}</style><p class="sx-verdict">{first}</p>{more}'
        f"<p>{links} · {escape(str(run.folder))}</p></div>"
    )


def finish_box(run: Run) -> Any:
    """Return a conversation with a trained run and its exports as widgets; None before that."""
    import ipywidgets

    if not run.is_done("train"):
        return None
    tabs = [ChatBox(run).box, ExportBox(run).box]
    return ipywidgets.Tab(tabs, titles=("Chat", "Export"))


def finish(run: Run | str | Path) -> None:
    """Show the verdict on a run, its report, a conversation with it and its exports.

    Args:
        run: A run, its name under `runs/`, or its folder.

    Raises:
        StageError: There is no such run.
    """
    from IPython.display import HTML, display

    found = find_run(run)
    display(HTML(finish_html(found, in_widget=False)))
    box = finish_box(found) if in_live_notebook() else None
    if box is not None:
        display(box)
