"""Exports of a finished run as buttons: each with its size, its file and what to type next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from strixft.app.cards import shown_error
from strixft.app.detached import start_on
from strixft.app.links import widget_link
from strixft.app.watch import LivePanel
from strixft.catalog.exports import KINDS, QUANTISATIONS
from strixft.catalog.methods import METHODS
from strixft.export.result import Exported
from strixft.export.stage import base_bytes
from strixft.model.files import model_folder
from strixft.model.source import model_source
from strixft.run.folder import Run
from strixft.run.open import find_run
from strixft.support import html
from strixft.support.files import folder_bytes
from strixft.support.text import typed, visible
from strixft.support.units import format_size
from strixft.train.stage import ADAPTER

NAMES = tuple(name for kind in KINDS for name in (QUANTISATIONS if kind == "gguf" else (kind,)))
"""Exports that have a button, in the order in which they are made."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One export: made, or to be made."""

    name: str
    why: str
    size_bytes: float | None
    """Size on disk; of one that is not made, about."""
    path: Path | None = None
    command: str = ""


def offers(run: Run) -> Iterator[Offer]:
    """Yield the trained adapter or weights, then every export of a run."""
    folder = run.stage_folder("train") / ADAPTER
    size = folder_bytes(folder) if folder.is_dir() else None
    is_whole = METHODS[run.recipe.method].adapter == "none"
    name, why = ("weights", "as trained") if is_whole else ("adapter", "as trained, for PEFT")
    yield Offer(name, why, size, folder, f"strixft chat {typed(run.folder)}")
    exported = Exported.load(run.stage_folder("export"))
    made = {row["name"]: row for row in exported.rows} if exported else {}
    base = model_folder(model_source(run.recipe.model))
    whole = base_bytes(run.recipe, base) if base else None
    for name in NAMES:
        if name == "gguf-lora" and METHODS[run.recipe.method].adapter != "lora":
            continue
        kind, why = name, KINDS[name].why if name in KINDS else ""
        if name in QUANTISATIONS:
            kind, why = "gguf", f"GGUF, about {QUANTISATIONS[name].bits:g} bits a weight"
        row = made.get(name)
        if row is not None:
            path = Path(row["path"]) if row["path"] else None
            yield Offer(name, why, row["bytes"], path, row["type"])
            continue
        bits = QUANTISATIONS[name].bits if kind == "gguf" else 16 if kind == "merged" else None
        about = whole * bits / 16 if whole and bits else None
        yield Offer(name, why, about)


class ExportBox:
    """The widgets; an export runs in a process of its own and shows itself below them.

    Args:
        run: A trained run.
    """

    def __init__(self, run: Run) -> None:
        import ipywidgets as widgets

        self._run = run
        self._widgets = widgets
        self._thread: threading.Thread | None = None
        self.rows = widgets.VBox()
        self.told = widgets.HTML()
        self.live = widgets.VBox()
        self.buttons: dict[str, Any] = {}
        self.box = widgets.VBox([self.rows, self.told, self.live])
        self.box.layout.max_width = "62rem"
        self.show()

    def show(self) -> None:
        """Show what is made and what can be."""
        self.buttons.clear()
        self.rows.children = [self._row(offer) for offer in offers(self._run)]

    def _row(self, offer: Offer) -> Any:
        is_made = bool(offer.command)
        size = format_size(offer.size_bytes) if offer.size_bytes is not None else ""
        about = "" if is_made or not size else "about "
        text = (
            f"<div style='line-height: 1.4; overflow-wrap: anywhere'><b>{offer.name}</b>"
            f" <small>{about}{size}</small><br><small style='opacity: .75'>{escape(offer.why)}"
            f"</small>{self._next(offer) if is_made else ''}</div>"
        )
        shown = self._widgets.HTML(text)
        shown.layout.flex = "1 1 14rem"
        shown.layout.min_width = "0"
        row = self._widgets.HBox([shown] if is_made else [self._button(offer.name), shown])
        row.layout.padding = "4px 0"
        return row

    def _button(self, name: str) -> Any:
        button = self._widgets.Button(description=f"Make {name}", icon="download")
        button.add_class(f"sx-make-{name}")
        button.layout.width = "9.5rem"
        button.on_click(lambda _: self.make(name))
        self.buttons[name] = button
        return button

    @staticmethod
    def _next(offer: Offer) -> str:
        place = ""
        if offer.path is not None:
            text = f"Download {offer.path.name}" if offer.path.is_file() else ""
            link = widget_link(offer.path, text, is_download=True)
            place = f"<br>{link}" if offer.path.is_file() else f"<br><code>{link}</code>"
        return f"{place}<br><code>{escape(visible(offer.command))}</code>"

    def make(self, name: str) -> None:
        """Start an export, and follow it in a thread."""
        for button in self.buttons.values():
            button.disabled = True
        self.told.value = html.note(f"Starting {name} …")
        self._thread = threading.Thread(target=self._make, args=(name,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last export has ended."""
        if self._thread is not None:
            self._thread.join()

    def _make(self, name: str) -> None:
        command = ("export", "--to", name)
        try:
            start_on(self._run, *command)
            self.told.value = ""
            panel = LivePanel(self._run, self._ended, command=command)
            self.live.children = [panel.box]
            panel.start()
            panel.wait()
        except Exception as error:  # else no button would come back
            self.told.value = shown_error(error)
            self.show()

    def _ended(self) -> None:
        if self._run.status()["state"] == "done":
            self.live.children = []
        self.show()


def exports(run: Run | str | Path) -> Any:
    """Return the exports of a trained run as buttons for a notebook.

    Args:
        run: A run, its name under `runs/`, or its folder.

    Raises:
        StageError: There is no such run.
    """
    return ExportBox(find_run(run)).box
