"""A run as it goes on, in a terminal and in a notebook; who looks away changes nothing."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from strixft.run.folder import Run
from strixft.run.live import View
from strixft.run.open import find_run, stop_run
from strixft.run.show import lines, one_line, to_html
from strixft.support.errors import StageError

SESSION = "JPY_SESSION_NAME"
"""Variable with the notebook's path, in the environment of a Jupyter server's kernels."""

EVERY_S = 1.0
"""Seconds between two looks."""

PIPE_EVERY_S = 10.0
"""Seconds between two lines where nobody sees a screen."""


def is_going_on(run: Run, view: View) -> bool:
    """Return whether a process works on the run."""
    return view.state == "running" or bool(run.workers())


def views(run: Run) -> Iterator[View]:
    """Yield views of a run until no process works on it, the last one included."""
    observer = run.observer()
    while True:
        view = observer.look()
        yield view
        if not is_going_on(run, view):
            return
        time.sleep(EVERY_S)


def in_live_notebook() -> bool:
    """Return whether a person sees this kernel's output as it comes.

    A Jupyter server tells the kernels that it starts which notebook is theirs; papermill and
    nbconvert, which start kernels by themselves, do not.
    """
    ipython = sys.modules.get("IPython")
    has_kernel = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return has_kernel and SESSION in os.environ


def watch(run: Run | str | Path) -> None:
    """Show a run until it ends; looking away leaves the run as it is.

    Args:
        run: A run, its name under `runs/`, or its folder.

    Raises:
        StageError: There is no such run.
    """
    found = run if isinstance(run, Run) else find_run(run)
    if in_live_notebook():
        LiveView(found)
        return
    with contextlib.suppress(KeyboardInterrupt):
        show_in_terminal(found)


class LiveView:
    """A run in a notebook, replaced in place by a thread, with a button that stops it.

    While the run goes on it is a widget, which a reloaded page finds again; at the end it becomes
    plain HTML, which stays in the notebook's file. The cell is free meanwhile.

    Args:
        run: A run at work.
        ending: Returns HTML to show below it once it has ended.
    """

    def __init__(self, run: Run, ending: Callable[[], str] = str) -> None:
        import ipywidgets
        from IPython.display import display

        self._run, self._ending = run, ending
        self._page = ipywidgets.HTML(to_html(run.observer().look()))
        self._button = ipywidgets.Button(description="Stop", icon="stop")
        self._button.tooltip = "Stops the run; its last update is saved"
        self._button.add_class("sx-stop")
        self._button.on_click(lambda _: threading.Thread(target=self._stop, daemon=True).start())
        self._handle = display(ipywidgets.VBox([self._page, self._button]), display_id=True)
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the run has ended."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # an interrupt is heard between two waits

    def _stop(self) -> None:
        self._button.disabled, self._button.description = True, "Stopping …"
        with contextlib.suppress(StageError):  # it has just ended
            stop_run(self._run)

    def _follow(self) -> None:
        from IPython.display import HTML

        for view in views(self._run):
            text = to_html(view)
            if text != self._page.value:
                self._page.value = text
        self._button.layout.display = "none"
        self._page.value = text + self._ending()
        self._handle.update(HTML(self._page.value))


def show_in_terminal(run: Run) -> None:
    """Show a run on standard output: in place on a terminal, else a line now and then."""
    from rich.console import Console

    shown = sys.stdout.isatty()  # a notebook's variables make rich believe so everywhere
    console = Console(highlight=False, markup=False, emoji=False, force_terminal=shown)
    if console.is_terminal:
        _show_in_place(run, console)
    else:
        _show_lines(run, console)


def _show_lines(run: Run, console: Any) -> None:
    told, before = -math.inf, ""
    for view in views(run):
        line = one_line(view)
        if line != before and time.monotonic() - told > PIPE_EVERY_S:
            console.print(line, soft_wrap=True)
            told, before = time.monotonic(), line
    console.print("\n".join(lines(view)), soft_wrap=True)


def _show_in_place(run: Run, console: Any) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    with Live(console=console, refresh_per_second=2) as live:
        for view in views(run):
            progress = view.progress
            bar = ProgressBar(total=progress.get("total"), completed=progress.get("done") or 0)
            live.update(Group(bar, Text("\n".join(lines(view)))))


@contextlib.contextmanager
def progress_shown(run: Run) -> Iterator[Any]:
    """Show one line of a run on standard error while a block runs; yield the console above it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    observer = run.observer()
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    with Live(
        get_renderable=lambda: Text(one_line(observer.look())),
        console=console,
        refresh_per_second=2,
        transient=True,
    ):
        yield console
