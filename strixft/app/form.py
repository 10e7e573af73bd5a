"""The form of `start-here`: model, data, settings, and the run as it goes on.

It stands on the recipe: everything that is chosen is a recipe's name and settings by dotted key,
which the form shows as a command and saves as YAML.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets

from strixft.app.background import Latest
from strixft.app.cards import shown_error
from strixft.app.choices import Choices, disk_line, drop_drafts
from strixft.app.detached import ended_by, start_on
from strixft.app.form_parts import DataSection, ModelSection, heading, note, row, section
from strixft.app.settings import SettingsPanel, style
from strixft.app.watch import LivePanel
from strixft.recipe.load import parse_overrides
from strixft.run.folder import Run
from strixft.run.open import find_run, find_runs, open_run, run_folder, stop_run
from strixft.support.environment import in_live_notebook
from strixft.support.errors import StrixftError
from strixft.support.files import now
from strixft.support.text import visible

if TYPE_CHECKING:  # they import torch and the data engine: seconds, while the form is there
    from strixft.app.lab import ReportPage
    from strixft.plan.explore import Answer, Explorer
    from strixft.prepare.stage import Prepared

NEW = ""
"""Value of the list of runs for a new one."""

TITLE = (
    '<h2 class="sx-title">Tune a model on your own data</h2><p class="sx-lead">Choose a model, give'
    " it chats, look at the plan, and start. Nothing leaves this machine.</p>"
)


def finished(run: Run) -> list[Any]:
    """Return widgets that are shown below a run that is done: verdict, report, chat, exports."""
    from strixft.app.finish import finish_box, finish_html
    from strixft.app.lab import ReportPage
    from strixft.app.report import write_report

    report = ReportPage(write_report(run))._repr_html_()
    shown = (
        f'{finish_html(run)}<details class="sx-fold"><summary>Report</summary>{report}</details>'
    )
    box = finish_box(run)
    return [ipywidgets.HTML(shown), *([box] if box is not None else [])]


class Form:
    """Widgets to begin a run, and to see one that was begun.

    Args:
        choices: The recipe and settings to begin with.
        run: The run to show; None begins a new one.
    """

    def __init__(self, choices: Choices, run: Run | None) -> None:
        self.choices = choices
        self._draft: Run | None = None
        self._reader = Latest()
        self._prepared: Prepared | None = None
        self.runs = ipywidgets.Dropdown(description="Run")
        self.runs.style.description_width, self.runs.layout.width = "2.5rem", "22rem"
        self.new = ipywidgets.Button(description="New run", icon="plus")
        self.models = ModelSection(self._choose_model)
        self.data = DataSection(self._choose_data, self._mend_data)
        self.settings = SettingsPanel(self._use, self._planned)
        self.name = ipywidgets.Text(description="Name", continuous_update=True)
        self.name.style.description_width = "3rem"
        self.start = ipywidgets.Button(description="Start", icon="play").add_class("sx-start")
        self.save = ipywidgets.Button(description="Save recipe.yaml", icon="save")
        self.command, self.said = ipywidgets.HTML(), ipywidgets.HTML()
        self.yaml, self.summary = ipywidgets.HTML(), ipywidgets.HTML()
        self.begun = ipywidgets.VBox([])
        self.choosing = ipywidgets.VBox(
            [
                self.models.box,
                self.data.box,
                section(heading(3, "Settings", "start at the plan's choice"), self.settings.box),
                section(
                    heading(4, "Run", "in a process of its own: this tab may be closed"),
                    row(self.name, self.start, self.save),
                    self.said,
                    self.command,
                    self.yaml,
                ),
            ]
        )
        self._connect()
        parts = [style(), ipywidgets.HTML(TITLE), row(self.runs, self.new)]
        self.box = ipywidgets.VBox([*parts, self.choosing, self.begun]).add_class("sx-form")
        self.show(run)
        threading.Thread(target=self._find_budget, name="budget", daemon=True).start()

    def _connect(self) -> None:
        self.new.on_click(lambda _: self.show(None))
        self.start.on_click(lambda _: self._guarded(self._start))
        self.save.on_click(lambda _: self._guarded(self._save))
        self.name.observe(lambda _: self._show_recipe(), "value")
        self.runs.observe(self._pick_run, "value")

    def _guarded(self, act: Callable[[], None]) -> None:
        """Do what a button asks for; show an error of ours as a card."""
        try:
            act()
        except (StrixftError, OSError) as error:
            self.said.value = shown_error(error)

    # the run that is shown

    def _list_runs(self, shown: Run | None) -> None:
        found = sorted(find_runs(), key=lambda run: run.status().get("updated", ""), reverse=True)
        rows = [(visible(f"{run.name}: {_state(run)}"), run.name) for run in found]
        self.runs.unobserve(self._pick_run, "value")
        self.runs.options = [("a new run", NEW), *rows]
        known = [name for _, name in rows]
        self.runs.value = shown.name if shown and shown.name in known else NEW
        self.runs.observe(self._pick_run, "value")
        self.runs.layout.display = self.new.layout.display = "" if rows else "none"

    def _pick_run(self, change: Any) -> None:
        self.show(find_run(change["new"]) if change["new"] else None)

    def show(self, run: Run | None) -> None:
        """Show a run that was begun, or the form for a new one."""
        self._list_runs(run)
        self.said.value = ""
        self.choosing.layout.display = "none" if run else ""
        self.begun.layout.display = "" if run else "none"
        if run is None:
            self._show_choices()
        else:
            self._show_run(run)

    def _show_run(self, run: Run) -> None:
        self.run = run
        self.summary.value = _summary(run)
        panel = LivePanel(run, lambda: self._ended(run))
        self.begun.children = [section(self.summary, self.said, panel.box)]
        panel.start()

    def _ended(self, run: Run) -> None:
        """Show what came of a run; called from a thread, each time that its work has ended."""
        if self.run.folder != run.folder:
            return  # another one is shown meanwhile
        if run.is_done(run.last_stage):
            self.said.value = '<p class="sx-working">Writing the report …</p>'
            try:
                self.begun.children = [self.begun.children[0], *finished(run)]
                self.said.value = ""
            except Exception as error:  # a thread's error is seen by nobody
                self.said.value = shown_error(error)
        self._list_runs(run)

    # a new run

    def _show_choices(self) -> None:
        self.models.show(self.choices.recipe_name)
        self._guarded(self._take_choices)

    def _take_choices(self) -> None:
        recipe = self.choices.load()
        has_data = self.choices.has_data()
        offer = self.models.offer(self.choices.recipe_name)
        text, is_enough = disk_line(recipe, offer.figures if offer else None)
        self.models.describe(recipe.model, text, is_enough=is_enough)
        self.name.value = self.choices.name()
        self._show_recipe()
        self.data.offer_own(Choices(self.choices.recipe).has_data())
        self._prepared = None
        self.start.disabled = True
        if has_data:
            self._read()
        else:
            self._reader.do(lambda _: None)  # data of another recipe are read no further
            self.data.working("")
            self._plan(None)

    def _choose_model(self, recipe: str, model: str | None) -> None:
        source = self.choices.overrides.get("dataset.source")
        overrides = {"dataset.source": source} if source else {}
        overrides |= {"model": model} if model else {}
        self.choices = Choices(recipe, overrides)
        self._show_choices()

    def _choose_data(self, source: str | None) -> None:
        self.choices.overrides.pop("dataset.source", None)
        if source is not None:
            self.choices.overrides["dataset.source"] = source
        self._guarded(self._take_choices)

    def _mend_data(self, settings: dict[str, Any]) -> None:
        self.choices.overrides |= settings
        self._guarded(self._take_choices)

    def _use(self, overrides: dict[str, Any]) -> None:
        """Apply the sliders' settings to the recipe."""
        reads = "dataset.max_length" in overrides
        self.choices.overrides |= overrides
        self._show_recipe()
        if reads and self.choices.has_data():
            self._read()
        else:
            self._plan(self._prepared)

    def _show_recipe(self) -> None:
        name = self.name.value
        self.command.value = (
            note("The same from a terminal:")
            + f'<code class="sx-command">{escape(visible(self.choices.command(name)))}</code>'
        )
        self.yaml.value = (
            '<details class="sx-fold"><summary>The recipe</summary><code class="sx-command">'
            f"{escape(visible(self.choices.text()))}</code></details>"
        )

    def _find_budget(self) -> None:
        from strixft.guard.host import budget_for, find_host

        try:
            memory = self.choices.load().memory
            limit = budget_for(memory, find_host(memory.host))
        except StrixftError:
            return  # the plan says why
        self.models.set_budget(limit.num_bytes)

    # data and plan, in the background

    def _read(self) -> None:
        """Prepare the data in a draft of the run, and plan with them."""
        self.start.disabled = True
        self.data.show_problem(None)
        self.data.working("Reading the data …")
        choices = Choices(self.choices.recipe, dict(self.choices.overrides))
        self._reader.do(lambda is_outdated: self._read_draft(choices, is_outdated))

    def _read_draft(self, choices: Choices, is_outdated: Callable[[], bool]) -> None:
        try:
            drop_drafts()
            draft = choices.draft(choices.name())
            start_on(draft, "prepare")
            while draft.workers():
                if is_outdated():
                    stop_run(draft)
                    return
                self.data.working(_progress(draft.status()))
                time.sleep(0.3)
            from strixft.prepare.stage import Prepared

            prepared = Prepared.load(draft.stage_folder(Prepared.name))
            if is_outdated():
                return
            if prepared is None:
                raise ended_by(draft) or StrixftError("the data were not read", fix="try again")
        except Exception as error:
            if not is_outdated():
                self.data.working("")
                self.data.show_problem(error)
            return
        self._draft, self._prepared = draft, prepared
        self.data.show_report(prepared._repr_html_(), _in_short(prepared.figures))
        self._plan(prepared)

    def _plan(self, prepared: Prepared | None) -> None:
        recipe = self.choices.load()

        def explorer() -> Explorer:
            from strixft.plan.explore import Explorer

            return Explorer(recipe, prepared)

        self.settings.load(explorer)

    def _planned(self, answer: Answer) -> None:
        """Let the run start once its data are read and its plan fits."""
        self.start.disabled = not (answer.fits and self._prepared)

    # buttons

    def _save(self) -> None:
        self._apply_sliders()
        path = self.choices.save(self.name.value)
        self.said.value = f'<div class="sx-said"><b>Saved: {escape(visible(str(path)))}</b></div>'

    def _apply_sliders(self) -> None:
        self.choices.overrides |= self.settings.changes()
        self._show_recipe()

    def _start(self) -> None:
        if self.start.disabled:
            return  # a second click on the way here
        self._apply_sliders()
        run = self.choices.begin(self.name.value, self._draft)
        self.start.disabled = True
        self._draft = None
        self.said.value = '<p class="sx-working">Starting …</p>'
        threading.Thread(target=self._start_on, args=(run,), daemon=True).start()

    def _start_on(self, run: Run) -> None:
        try:
            start_on(run, "run")
        except (StrixftError, OSError) as error:
            self.show(run)
            self.said.value = shown_error(error)
            return
        self.show(run)

    def wait(self) -> None:
        """Wait until the data are read and all is planned."""
        self._reader.wait()
        self.settings.wait()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)


def _state(run: Run) -> str:
    return "running" if run.workers() else str(run.status()["state"])


def _progress(status: Mapping[str, Any]) -> str:
    doing = status.get("doing") or {}
    done, total = doing.get("done"), doing.get("total")
    if not done:
        return "Reading the data …"
    of = f" of {total:,}" if total else ""
    return f"Reading the data: {doing.get('unit') or 'row'} {done:,}{of}"


def _in_short(figures: Mapping[str, Any]) -> str:
    """Return what was read in a sentence."""
    left_out = figures["rows_read"] - figures["rows_train"] - figures["rows_validation"]
    words = f"{figures['rows_train']:,} rows to train, {figures['rows_validation']:,} held out"
    words += f", {left_out:,} left out" if left_out > 0 else ""
    return f"{words}; {figures['trained_tokens']:,} of {figures['tokens']:,} tokens are trained"


def _summary(run: Run) -> str:
    """Return the settings of a run that was begun, which are locked."""
    recipe = run.recipe
    facts = {
        "model": recipe.model,
        "data": ", ".join(Path(one).name for one in recipe.dataset.sources()),
        "method": recipe.method,
        "rank": recipe.lora.r,
        "epochs": recipe.train.epochs,
        "row length": recipe.dataset.max_length,
        "rows": recipe.train.micro_batch,
    }
    cells = "".join(
        f"<div><small>{name}</small>{escape(visible(str(value)))}</div>"
        for name, value in facts.items()
    )
    return f'<div class="sx-facts">{cells}</div>'


def shown_first(folder: Path | None) -> Run | None:
    """Return the run to show at first: the one that is named, one at work, else the newest."""
    if folder is not None and (folder / "recipe.yaml").is_file():
        return find_run(folder)
    found = [run for run in find_runs() if run.status()["stage"]]
    at_work = [run for run in found if run.workers()]
    newest = sorted(at_work or found, key=lambda run: run.status().get("updated", now()))
    return newest[-1] if newest else None


def start(
    recipe: str | Path = "recipes/demo.yaml",
    run_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | str | None = None,
) -> Form | ReportPage | None:
    """Show the form where a person sees the notebook; elsewhere run the stages.

    Args:
        recipe: Name or path of the recipe to begin with.
        run_dir: Run folder; `runs/<recipe>` by default.
        overrides: Values by dotted key, or their JSON text.

    Returns:
        The form; without a person the report.

    Raises:
        StrixftError: The recipe has faults, or a stage failed.
    """
    if in_live_notebook():
        folder = run_folder(Path(recipe), run_dir) if run_dir else None
        return Form(Choices(str(recipe), parse_overrides(overrides)), shown_first(folder))
    from IPython.display import display

    from strixft.app.attend import prepare_recipe
    from strixft.app.lab import list_recipes, run_recipe
    from strixft.plan.result import plan_recipe

    run = open_run(recipe, run_dir, overrides)
    display(list_recipes(), prepare_recipe(run), plan_recipe(run))
    return run_recipe(recipe, run_dir, overrides)
