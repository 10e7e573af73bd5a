"""Sliders bound to the planner: a moved one shows memory and time, and can be applied."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets

from strixft.app.background import Latest
from strixft.app.cards import shown_error
from strixft.catalog.methods import METHODS
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.environment import in_live_notebook
from strixft.support.errors import StrixftError

if TYPE_CHECKING:  # they import torch: seconds, while the form is there already
    from strixft.plan.explore import Answer, Explorer, Settings

RANKS = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
AUTO = "auto"

SETTLED_S = 0.15
"""Seconds that a slider rests before its exact answer is worked out."""

STYLE = Path(__file__).with_name("form.css").read_text(encoding="utf-8")


def _with(values: Sequence[int], value: int) -> list[int]:
    return sorted({*values, value})


class SettingsPanel:
    """Method, rank, epochs, row length and rows of a recipe, with what they need and take.

    Args:
        use: Called with the settings that differ, by dotted key, when they are to be applied.
        planned: Called from another thread with each exact answer.
    """

    def __init__(
        self,
        use: Callable[[dict[str, Any]], None],
        planned: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self._use, self._planned = use, planned
        self._explorer: Explorer | None = None
        self._choice: Answer | None = None
        self._quiet = False
        self._worker = Latest()
        wide = ipywidgets.Layout(width="auto", min_width="0")
        label = {"description_width": "6.5rem"}
        self.method = ipywidgets.Dropdown(options=list(METHODS), description="Method")
        self.rank = ipywidgets.SelectionSlider(options=RANKS, value=16, description="Rank")
        self.epochs = ipywidgets.FloatSlider(
            1, min=0.05, max=10, step=0.05, readout_format=".2f", description="Epochs"
        )
        self.length = ipywidgets.SelectionSlider(
            options=LENGTHS, value=2048, description="Row length"
        )
        self.rows = ipywidgets.SelectionSlider(options=[AUTO], description="Rows at once")
        self.controls = [self.method, self.rank, self.epochs, self.length, self.rows]
        for control in self.controls:
            control.layout, control.style = wide, label
            control.disabled = True
            control.observe(self._moved, "value")
        self.use_button = ipywidgets.Button(
            description="Use these settings", button_style="primary"
        )
        self.reset = ipywidgets.Button(description="Reset to the plan")
        self.use_button.on_click(lambda _: self._apply())
        self.reset.on_click(lambda _: self._set(self._start()))
        self.state = ipywidgets.HTML()
        self.bar, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        buttons = ipywidgets.Box([self.use_button, self.reset]).add_class("sx-row")
        sliders = ipywidgets.VBox([*self.controls, buttons]).add_class("sx-sliders")
        shown = ipywidgets.VBox([self.bar, self.picture]).add_class("sx-shown")
        both = ipywidgets.Box([sliders, shown]).add_class("sx-two")
        self.box = ipywidgets.VBox([self.state, both]).add_class("sx-settings")
        self._enable()

    def load(self, make: Callable[[], Explorer]) -> None:
        """Plan in the background, and show the choice.

        Args:
            make: Returns answers for a recipe; called from another thread.
        """
        self._explorer = self._choice = None
        self._enable()
        self._say("Planning …")

        def job(is_outdated: Callable[[], bool]) -> None:
            try:
                explorer = make()
            except Exception as error:
                self.show_error(error)
                return
            if is_outdated():
                return
            self._explorer, self._choice = explorer, explorer.last
            self._set(explorer.start)
            self._show(explorer.last)
            self._show_rows()
            self._say("")

        self._worker.do(job)

    def show_error(self, error: Exception) -> None:
        """Show an error in the place of an answer."""
        self.bar.value = self.picture.value = ""
        self._say(shown_error(error), is_html=True)

    def asked(self) -> Settings:
        """Return the settings of the sliders."""
        from strixft.plan.explore import Settings

        rows = self.rows.value
        return Settings(
            method=self.method.value,
            rank=self.rank.value,
            length=self.length.value,
            epochs=round(self.epochs.value, 4),
            rows=None if rows == AUTO else rows,
        )

    def changes(self) -> dict[str, Any]:
        """Return the settings that differ from the recipe, by dotted key."""
        return self.asked().overrides(self._explorer.recipe) if self._explorer else {}

    def wait(self) -> None:
        """Wait until all is answered."""
        self._worker.wait()

    def _start(self) -> Settings:
        assert self._explorer is not None
        return self._explorer.start

    def _say(self, text: str, *, is_html: bool = False) -> None:
        working = f'<p class="sx-working">{escape(text)}</p>' if text else ""
        self.state.value = text if is_html else working

    def _enable(self) -> None:
        known = self._explorer is not None
        for control in self.controls:
            control.disabled = not known
        moved = known and bool(self.changes())
        self.use_button.disabled = self.reset.disabled = not moved
        uses_rank = METHODS[self.method.value].adapter != "none"
        self.rank.disabled = not (known and uses_rank)

    def _set(self, settings: Settings) -> None:
        """Put the sliders to some settings, and answer once."""
        self._quiet = True
        self.method.value = settings.method
        for slider, values, value in (
            (self.rank, RANKS, settings.rank),
            (self.length, LENGTHS, settings.length),
        ):
            slider.options = _with(values, value)
            slider.value = value
        self.epochs.max = max(10, settings.epochs)
        self.epochs.value = settings.epochs
        explorer = self._explorer
        counts = explorer.rows(settings) if explorer else []
        if settings.rows:
            counts = _with(counts, settings.rows)
        self.rows.options = [AUTO, *counts]
        self.rows.value = settings.rows or AUTO
        self._quiet = False
        self._moved(None)

    def _moved(self, _: Any) -> None:
        explorer = self._explorer
        if self._quiet or explorer is None:
            return
        settings = self.asked()
        self._enable()
        if self._choice is not None and settings == self._choice.settings:
            self._show(self._choice)
        else:
            self._show(explorer.at_once(settings))
        self._worker.do(lambda is_outdated: self._exactly(explorer, settings, is_outdated))

    def _exactly(
        self, explorer: Explorer, settings: Settings, is_outdated: Callable[[], bool]
    ) -> None:
        time.sleep(SETTLED_S)
        if is_outdated():
            return
        try:
            found = explorer.exact(settings)
        except Exception as error:
            self.show_error(error)
            return
        if not is_outdated() and explorer is self._explorer:
            self._show(found)
            self._say("")
            self._show_rows()

    def _show(self, answer: Answer) -> None:
        from strixft.plan.bar import bar

        self.bar.value = bar(answer, self._choice)
        if answer.is_exact:
            self._planned(answer)

    def _show_rows(self) -> None:
        from strixft.plan.bar import columns

        explorer, choice = self._explorer, self._choice
        if explorer is None or choice is None:
            return
        need = explorer.need_by_rows(explorer.last.settings)
        limit = explorer.limit.num_bytes
        several = len(need) > 1
        picture = columns(need, limit, explorer.last.rows, choice.rows)
        self.picture.value = picture if several else ""

    def _apply(self) -> None:
        try:
            self._use(self.changes())
        except StrixftError as error:
            self._say(shown_error(error), is_html=True)


class PlanSliders:
    """The sliders of a run, which change its recipe; a picture where there is no kernel.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def _explore(self) -> Explorer:
        from strixft.plan.explore import Explorer
        from strixft.prepare.stage import Prepared

        run = self._run
        return Explorer(run.recipe, Prepared.load(run.stage_folder(Prepared.name)))

    def _apply(self, overrides: dict[str, Any]) -> None:
        self._run = open_run(self._run.folder / "recipe.yaml", self._run.folder, overrides)
        self.panel.load(self._explore)

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        if not in_live_notebook():
            explorer = self._explore()
            display(HTML(self.picture(explorer)))
            return
        self.panel = SettingsPanel(self._apply)
        self.panel.load(self._explore)
        display(ipywidgets.VBox([style(), self.panel.box]))

    def picture(self, explorer: Explorer) -> str:
        """Return the plan's choice as a picture."""
        from strixft.plan.bar import bar, columns

        last, limit = explorer.last, explorer.limit.num_bytes
        need = explorer.need_by_rows(last.settings)
        return bar(last) + columns(need, limit, last.rows, last.rows)


def explore_plan(run: Run) -> PlanSliders:
    """Return sliders for a run on its host; prepared data make time and updates known.

    Args:
        run: The run; using the settings changes its recipe.
    """
    return PlanSliders(run)


def style() -> Any:
    """Return the looks of the form as a widget."""
    return ipywidgets.HTML(f"<style>{STYLE}</style>")
