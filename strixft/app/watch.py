"""A run as it goes on, in a terminal and in a notebook; who looks away changes nothing."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from strixft.app.cards import card
from strixft.app.detached import start_on
from strixft.run.folder import Run
from strixft.run.live import RESUMABLE, View
from strixft.run.open import find_run, stop_run
from strixft.run.show import lines, one_line, to_html
from strixft.support.environment import in_live_notebook
from strixft.support.errors import StageError, StrixftError

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
    """A run in a notebook, replaced in place by a thread, with buttons that stop and resume it.

    While the run goes on it is a widget, which a reloaded page finds again; at the end it becomes
    plain HTML, which stays in the notebook's file. The cell is free meanwhile.

    Args:
        run: A run at work, or one that was.
        ending: Returns HTML to show below it once it has ended.
        command: Command that resumes the run, and its options.
        after: Returns a widget to show below a run that is finished, or None.
    """

    def __init__(
        self,
        run: Run,
        ending: Callable[[], str] = str,
        *,
        command: Sequence[str] = ("run",),
        after: Callable[[], Any] = lambda: None,
    ) -> None:
        import ipywidgets
        from IPython.display import display

        self._run, self._ending, self._command, self._after = run, ending, command, after
        self._page = ipywidgets.HTML(to_html(run.observer().look()))
        self._pause = self._button("Pause", "pause", "Saves the last update; Resume continues")
        self._stop = self._button("Stop", "stop", "Stops the run; its last update is saved")
        self._resume = self._button("Resume", "play", "Continues with the same stage")
        self._pause.on_click(lambda _: self._in_thread(self._end, "paused"))
        self._stop.on_click(lambda _: self._in_thread(self._end, "stopped"))
        self._resume.on_click(lambda _: self._in_thread(self._go_on))
        self._handle = display(self._page, display_id=True)
        self._below = ipywidgets.VBox([ipywidgets.HBox([self._pause, self._stop])])
        display(self._below)
        self._thread = self._in_thread(self._follow)

    @staticmethod
    def _button(name: str, icon: str, tooltip: str) -> Any:
        import ipywidgets

        button = ipywidgets.Button(description=name, icon=icon, tooltip=tooltip)
        button.add_class(f"sx-{name.lower()}")
        return button

    @staticmethod
    def _in_thread(work: Callable[..., None], *given: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=given, name="live view", daemon=True)
        thread.start()
        return thread

    def wait(self) -> None:
        """Wait until the run has ended."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # an interrupt is heard between two waits

    def _end(self, state: str) -> None:
        self._pause.disabled = self._stop.disabled = True
        button = self._pause if state == "paused" else self._stop
        name, button.description = button.description, "Saving …"
        with contextlib.suppress(StageError):  # it has just ended
            stop_run(self._run, state=state)
        button.description = name

    def _go_on(self) -> None:
        self._resume.disabled = True
        try:
            start_on(self._run, *self._command)
        except StrixftError as error:
            self._handle.update(_as_html(card(error)))
            return
        finally:
            self._resume.disabled = False
        self._pause.disabled = self._stop.disabled = False
        self._handle.update(self._page)
        self._below.children = [self._button_row(self._pause, self._stop)]
        self._thread = self._in_thread(self._follow)

    @staticmethod
    def _button_row(*buttons: Any) -> Any:
        import ipywidgets

        return ipywidgets.HBox(buttons)

    def _follow(self) -> None:
        for view in views(self._run):
            text = to_html(view)
            if text != self._page.value:
                self._page.value = text
        self._handle.update(_as_html(text + self._ending()))
        if view.state in RESUMABLE:
            self._below.children = [self._button_row(self._resume)]
        else:
            shown = self._after()
            self._below.children = [] if shown is None else [shown]


def _as_html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)


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
