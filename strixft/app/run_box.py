"""All runs in a notebook: a list, and buttons for those that are chosen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from strixft.app.cards import shown_error
from strixft.app.compare import Comparison
from strixft.app.detached import start_on
from strixft.app.links import widget_link
from strixft.run.folder import Run
from strixft.run.manage import (
    RUN_HEADER,
    binned,
    delete_run,
    list_runs,
    note_run,
    rename_run,
    restore_run,
    run_row,
)
from strixft.run.open import find_run, stop_run
from strixft.run.show import PAGE
from strixft.support import html
from strixft.support.errors import StageError
from strixft.support.text import visible
from strixft.support.units import format_size

EVERY_S = 2.0
"""Seconds between two looks while a run is at work."""

COLUMNS = "minmax(6rem, 2fr) minmax(6rem, 2fr) 4.5rem 5rem 6.5rem 7rem 5rem 7.5rem"

STYLE = f"""
.sx-run {{ display: grid; grid-template-columns: {COLUMNS}; gap: 0 .8rem; line-height: 1.35;
  font: 13.5px/1.35 system-ui, sans-serif; font-variant-numeric: tabular-nums }}
.sx-run > span {{ overflow-wrap: anywhere }}
.sx-run .sx-more {{ grid-column: 1 / -1; opacity: .75 }}
.sx-run-head {{ font-weight: 600; padding-left: 1.9rem }}
.sx-run .sx-failed, .sx-run .sx-unreadable {{ color: #c2410c; font-weight: 600 }}
.sx-run .sx-running {{ font-weight: 600 }}
.sx-run-row {{ border-top: 1px solid rgba(120, 130, 150, .3); padding: 3px 0 }}
.sx-run-row .widget-checkbox {{ width: 1.9rem }}
@media (max-width: 900px) {{ .sx-run {{ grid-template-columns: repeat(3, 1fr) }}
  .sx-run-head {{ display: none }} }}
"""


def row_html(row: Mapping[str, Any]) -> str:
    """Return a row of `list_runs` as HTML, with its note, its problem and links to its pages."""
    cells = [
        f'<span class="sx-{escape(cell)}">{escape(visible(cell))}</span>'
        if name == "state"
        else f"<span>{escape(visible(cell))}</span>"
        for name, cell in zip(RUN_HEADER, run_row(row), strict=True)
    ]
    folder = Path(row["folder"])
    pages = {"report": folder / "report.html", "live view": folder / PAGE}
    more: list[str] = [widget_link(path, name) for name, path in pages.items() if path.is_file()]
    told = [row["note"], str(row.get("problem") or "") if row["state"] == "failed" else ""]
    more += [escape(visible(text)) for text in told if text]
    below = f'<span class="sx-more">{" · ".join(more)}</span>' if more else ""
    return f'<div class="sx-run">{"".join(cells)}{below}</div>'


class RunBox:
    """The list, its buttons, and what they tell."""

    def __init__(self) -> None:
        import ipywidgets as widgets

        self._widgets = widgets
        self._boxes: dict[str, tuple[Any, Any]] = {}
        self.rows = widgets.VBox()
        self.told = widgets.HTML()
        self.text = widgets.Text(placeholder="new name, or a note")
        self.text.layout.width = "16rem"
        self.bin = widgets.Dropdown(
            options=[], description="bin", style={"description_width": "2rem"}
        )
        self.bin.layout.width = "14rem"
        work: dict[str, tuple[str, Callable[[], str]]] = {
            "Resume": ("Continues the chosen run in a process of its own", self._resume),
            "Stop": ("Stops the chosen run; its last update is saved", self._stop),
            "Compare": ("Shows two or more beside each other", self._compare),
            "Rename": ("Gives the chosen run the name in the field", self._rename),
            "Note": ("Puts the text in the field beside the chosen run", self._note),
            "Delete": ("Moves the chosen runs into the bin", self._delete),
            "Restore": ("Brings the run that is chosen in the bin back", self._restore),
            "Refresh": ("Looks again", lambda: ""),
        }
        self.buttons = {name: self._button(name, *of) for name, of in work.items()}
        first = [self.buttons[n] for n in ("Resume", "Stop", "Compare", "Delete", "Refresh")]
        named = widgets.HBox([self.text, self.buttons["Rename"], self.buttons["Note"]])
        back = widgets.HBox([self.bin, self.buttons["Restore"]])
        lines = [widgets.HBox(first), widgets.HBox([named, back])]
        for line in lines:
            line.layout.flex_flow = "row wrap"
        head = "".join(f"<span>{name}</span>" for name in RUN_HEADER)
        style = f"<style>{STYLE}</style>"
        header = widgets.HTML(f'{style}<div class="sx-run sx-run-head">{head}</div>')
        self.box = widgets.VBox([header, self.rows, *lines, self.told])
        self.look()
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def _button(self, name: str, tooltip: str, work: Callable[[], str]) -> Any:
        button = self._widgets.Button(description=name, tooltip=tooltip)
        button.layout.width = "6rem"
        button.add_class(f"sx-runs-{name.lower()}")

        def do(_: Any) -> None:
            threading.Thread(target=self._do, args=(button, work), daemon=True).start()

        button.on_click(do)
        return button

    def _do(self, button: Any, work: Callable[[], str]) -> None:
        button.disabled = True
        try:
            told = work()
        except Exception as error:  # else its button would not come back
            told = shown_error(error)
        button.disabled = False
        self.look()
        self.told.value = told

    def _keep_looking(self) -> None:
        """Look again and again while a run is at work."""
        while any(row["state"] == "running" for row in self.look()):
            time.sleep(EVERY_S)

    def look(self) -> list[dict[str, Any]]:
        """Show the runs as they are now, and return them."""
        found = list_runs()
        names = [row["run"] for row in found]
        if names != list(self._boxes):
            chosen = set(self.chosen())
            self._boxes = {name: self._row(name in chosen) for name in names}
            self.rows.children = [self._line(*boxes) for boxes in self._boxes.values()]
        for row in found:
            shown, text = self._boxes[row["run"]][1], row_html(row)
            if shown.value != text:
                shown.value = text
        there = tuple(path.name for path in binned())
        if there != self.bin.options:
            self.bin.options = there
            self.bin.index = 0 if there else None
        if not found:
            self.rows.children = [self._widgets.HTML(html.note("There are no runs yet."))]
        return found

    def _row(self, is_chosen: bool) -> tuple[Any, Any]:
        tick = self._widgets.Checkbox(is_chosen, indent=False)
        tick.layout.width = "1.9rem"
        shown = self._widgets.HTML()
        shown.layout.flex = "1 1 auto"
        return tick, shown

    def _line(self, tick: Any, shown: Any) -> Any:
        line = self._widgets.HBox([tick, shown])
        line.add_class("sx-run-row")
        return line

    def chosen(self) -> list[str]:
        """Return the names of the chosen runs."""
        return [name for name, (tick, _) in self._boxes.items() if tick.value]

    def _only(self) -> Run:
        chosen = self.chosen()
        if len(chosen) != 1:
            raise StageError(f"{len(chosen)} runs are chosen", fix="tick the box of one run")
        return find_run(chosen[0])

    def _resume(self) -> str:
        run = self._only()
        start_on(run, "run")
        threading.Thread(target=self._keep_looking, daemon=True).start()
        return html.note(f"{run.name} goes on; watch it: sx.watch({run.name!r})")

    def _stop(self) -> str:
        run = self._only()
        return html.note(f"{run.name}: {stop_run(run)['state']}")

    def _compare(self) -> str:
        chosen = self.chosen()
        if len(chosen) < 2:
            raise StageError("comparing takes two runs", fix="tick the boxes of two or more runs")
        return Comparison([find_run(name) for name in chosen])._repr_html_()

    def _rename(self) -> str:
        run = self._only()
        target = rename_run(run, self.text.value.strip())
        self.text.value = ""
        return html.note(f"{run.name} is now {target.name}")

    def _note(self) -> str:
        run = self._only()
        note_run(run, self.text.value)
        self.text.value = ""
        return html.note(f"{run.name}: note written")

    def _delete(self) -> str:
        chosen = self.chosen()
        if not chosen:
            raise StageError("no run is chosen", fix="tick the boxes of the runs to delete")
        rows = {row["run"]: row for row in list_runs()}
        told = []
        for name in chosen:
            size, place = rows[name]["bytes"], delete_run(Path(rows[name]["folder"]))
            told.append(f"{name}: {size:,} bytes ({format_size(size)}) in {place}")
        return "".join(map(html.note, [*told, "Restore brings a run back from the bin."]))

    def _restore(self) -> str:
        if not self.bin.value:
            raise StageError("the bin is empty", fix="there is nothing to restore")
        return html.note(f"{restore_run(self.bin.value).name} is back")


def runs() -> Any:
    """Return the runs of this workspace as a list with buttons, for a notebook."""
    return RunBox().box
