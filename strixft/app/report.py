"""The report: one self-contained HTML page for each run, made from the run folder alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from strixft.evaluate.stage import Evaluated
from strixft.evaluate.verdict import forgotten, verdict
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

SECTIONS: dict[str, type[Result]] = {"Data": Prepared, "Plan": Plan, "Training": Trained}


def render_report(run: Run) -> str:
    """Return the page as HTML; every text from data, models and recipes is escaped."""
    kinds: list[type[Result]] = [*SECTIONS.values(), Evaluated, Exported]
    loaded = {kind: kind.load(run.stage_folder(kind.name)) for kind in kinds}
    results = [result for result in loaded.values() if result]
    evaluated, trained = loaded[Evaluated], loaded[Trained]
    exported, judged = loaded[Exported], None
    seconds = {one.name: one.seconds + one.figures.get("earlier_seconds", 0) for one in results}
    flag = compare.warning(trained.figures) if trained else None

    body = html.note("Not evaluated yet.")
    if isinstance(evaluated, Evaluated):
        judged = evaluated.judged
        rows = [
            [name, format_number(values["base"]), format_number(values["tuned"])]
            for name, values in evaluated.figures["metrics"].items()
        ]
        said = (verdict(evaluated.figures), forgotten(evaluated.figures))
        body = "".join(map(html.note, filter(None, said)))
        body += html.table(rows, ["measure", "base", "tuned"])
    body += html.warning(flag) if flag else ""
    for title, kind in (SECTIONS | {"Base against tuned": Evaluated}).items():
        result = loaded[kind]
        shown = result._repr_html_() if result else html.note("Not done yet.")
        body += f"<h2>{title}</h2>{shown}"
    body += f"<h2>Judge</h2>{judged._repr_html_()}" if judged else ""
    body += f"<h2>Export</h2>{exported._repr_html_()}" if exported else ""
    body += f"<h2>Recipe</h2><pre>{escape(dump_recipe(run.recipe))}</pre><h2>Versions</h2>"
    body += html.mapping(results[-1].versions | results[-1].host) if results else ""
    times = [[name, format_seconds(took)] for name, took in seconds.items()]
    body += "<h2>Time</h2>" + html.table(times, ["stage", "took"])
    lead = (
        f"{run.recipe.method} on {run.recipe.model}, {format_seconds(sum(seconds.values()))} in all"
    )
    return html.page(run.name, lead, body)


def write_report(run: Run) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        HostError: It cannot be written.
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
