"""One self-contained HTML page per run, made from the run folder alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from strixft import views
from strixft.errors import HostError
from strixft.evaluate import Evaluated
from strixft.export import Exported
from strixft.plan import Plan, compare
from strixft.prepare import Prepared
from strixft.recipe import dump_recipe
from strixft.runs import Result, Run, write_text
from strixft.text import typed
from strixft.train import Trained
from strixft.units import format_number, format_seconds

SECTIONS: dict[str, type[Result]] = {
    "Data": Prepared,
    "Plan": Plan,
    "Training": Trained,
}


def _headline(evaluated: Evaluated | None) -> str:
    if evaluated is None:
        return views.note("Not evaluated yet.")
    rows = [
        [name, format_number(values["base"]), format_number(values["tuned"])]
        for name, values in evaluated.figures["metrics"].items()
    ]
    return views.table(rows, ["measure", "base", "tuned"])


def _flag(trained: Trained | None) -> str:
    text = compare.warning(trained.figures) if trained else None
    return views.warning(text) if text else ""


def _sections(run: Run) -> str:
    markup = ""
    for title, kind in SECTIONS.items():
        result = kind.load(run.stage_folder(kind.name))
        body = views.note("Not done yet.") if result is None else result._repr_html_()
        markup += f"<h2>{title}</h2>{body}"
    return markup


def _versions(run: Run, result: Result | None) -> str:
    versions = views.mapping(result.versions | result.host) if result else ""
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
    answers = evaluated._repr_html_() if evaluated else views.note("Not done yet.")
    judged = evaluated.judged if evaluated else None
    return views.page(
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
