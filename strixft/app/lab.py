"""Recipes to choose from, and a run with its report, in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from strixft.app.detached import start_on
from strixft.app.finish import finish_box, finish_html
from strixft.app.notebooks import run_stages
from strixft.app.report import write_report
from strixft.app.watch import LiveView
from strixft.recipe.find import HEADER, describe, find_recipe, find_recipes
from strixft.recipe.load import parse_overrides
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support import html
from strixft.support.environment import in_live_notebook


@dataclass(frozen=True)
class RecipeList:
    """Recipes to choose from."""

    recipes: Mapping[str, Path]

    def _repr_html_(self) -> str:
        return html.table([[name, *describe(path)] for name, path in self.recipes.items()], HEADER)


def list_recipes() -> RecipeList:
    """Return the recipes of the workspace and those that ship."""
    return RecipeList(find_recipes())


@dataclass(frozen=True)
class ReportPage:
    """The report of a run, as a notebook shows it."""

    path: Path

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"))
        return (
            f'<iframe srcdoc="{page}" sandbox style="width: 100%; height: 40rem; border: 0">'
            f"</iframe>{html.note(str(self.path))}"
        )


def run_recipe(
    recipe: str | Path,
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    first: str | None = None,
) -> ReportPage | None:
    """Run the unfinished stages and write the report.

    In a notebook that a person looks at they run in a process of their own, which the cell shows:
    it is free at once, and shows the report at the end.

    Args:
        recipe: Name or path of the recipe.
        run_dir: Run folder; `runs/<recipe>` by default.
        overrides: Values by dotted key, or their JSON text.
        first: Stage to repeat, together with the later ones; their results are set aside.

    Raises:
        StrixftError: A stage failed; the fix ends with the command that resumes.
    """
    run = open_run(recipe, run_dir, overrides, first=first)
    if in_live_notebook() and (first or not run.is_done(run.last_stage)):
        if not run.workers():
            start_on(run, "run", *(["--from", first] if first else []))
        LiveView(run, lambda: _ending(run), after=lambda: finish_box(run))
        return None
    run_stages(run, find_recipe(recipe), parse_overrides(overrides), first=first)
    return ReportPage(write_report(run))


def _ending(run: Run) -> str:
    """Return verdict and report of a run that has ended; nothing if a stage is missing."""
    if not run.is_done(run.last_stage):
        return ""
    return finish_html(run, in_widget=False) + ReportPage(write_report(run))._repr_html_()
