"""One self-contained HTML page per run, made from the run folder alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from strixft.evaluate.stage import Evaluated
from strixft.export.result import Exported
from strixft.plan.result import Plan
from strixft.prepare.stage import Prepared
from strixft.recipe.load import dump_recipe
from strixft.run.folder import Result, Run
from strixft.support import html
from strixft.support.errors import HostError
from strixft.support.files import write_text
from strixft.support.text import typed
from strixft.support.units import format_number, format_seconds
from strixft.train import compare
from strixft.train.stage import Trained

SECTIONS: dict[str, type[Result]] = {
    "Data": Prepared,
    "Plan": Plan,
    "Training": Trained,
}


def _headline(evaluated: Evaluated | None) -> str:
    if evaluated is None:
        return html.note("Not evaluated yet.")
    rows = [
        [name, format_number(values["base"]), format_number(values["tuned"])]
        for name, values in evaluated.figures["metrics"].items()
    ]
    return html.table(rows, ["measure", "base", "tuned"])


def _flag(trained: Trained | None) -> str:
    text = compare.warning(trained.figures) if trained else None
    return html.warning(text) if text else ""


def _sections(run: Run) -> str:
    markup = ""
    for title, kind in SECTIONS.items():
        result = kind.load(run.stage_folder(kind.name))
        body = html.note("Not done yet.") if result is None else result._repr_html_()
        markup += f"<h2>{title}</h2>{body}"
    return markup


def _versions(run: Run, result: Result | None) -> str:
    versions = html.mapping(result.versions | result.host) if result else ""
    return f"<h2>Recipe</h2><pre>{escape(dump_recipe(run.recipe))}</pre><h2>Versions</h2>{versions}"


def render_report(run: Run) -> str:
    """The page as HTML; every text from data, models and recipes is escaped."""
    trained = Trained.load(run.stage_folder(Trained.name))
    evaluated = Evaluated.load(run.stage_folder(Evaluated.name))
    exported = Exported.load(run.stage_folder(Exported.name))
    kinds: list[type[Result]] = [*SECTIONS.values(), Evaluated, Exported]
    results = [kind.load(run.stage_folder(kind.name)) for kind in kinds]
    seconds = sum(result.seconds for result in results if result)
    lead = f"{run.recipe.method} on {run.recipe.model}, {format_seconds(seconds)} in all"
    answers = evaluated._repr_html_() if evaluated else html.note("Not done yet.")
    judged = evaluated.judged if evaluated else None
    return html.page(
        run.name,
        lead,
        f"{_headline(evaluated)}{_flag(trained)}{_sections(run)}"
        f"<h2>Base against tuned</h2>{answers}"
        f"{f'<h2>Judge</h2>{judged._repr_html_()}' if judged else ''}"
        f"{f'<h2>Export</h2>{exported._repr_html_()}' if exported else ''}"
        f"{_versions(run, next((r for r in reversed(results) if r), None))}",
    )


def write_report(run: Run) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        HostError: It cannot be written there.
    """
    path = run.folder / "report.html"
    markup = render_report(run)
    try:
        write_text(path, markup)
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}",
            fix=f"ls -ld {typed(run.folder)} {typed(path)}   shows what is there, and whose it is",
        ) from error
    return path
