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

from strixft.app.cards import cell_fix, shown_error
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
    found = find_run(run)
    if in_live_notebook():
        LiveView(found)
        return
    with contextlib.suppress(KeyboardInterrupt):
        show_in_terminal(found)


class LivePanel:
    """A run as widgets that a thread renews, with buttons that pause, stop and resume it.

    Args:
        run: A run at work, or one that was.
        ended: Called from the thread each time it has ended.
        command: Command that resumes the run, and its options.
    """

    def __init__(
        self,
        run: Run,
        ended: Callable[[], None] = lambda: None,
        *,
        command: Sequence[str] = ("run",),
    ) -> None:
        import ipywidgets

        self._run, self._ended, self._command = run, ended, command
        self.page = ipywidgets.HTML(to_html(run.observer().look(), cell_fix))
        self._pause = self._button("Pause", "pause", "Saves the last update; Resume continues")
        self._stop = self._button("Stop", "stop", "Stops the run; its last update is saved")
        self._resume = self._button("Resume", "play", "Continues with the same stage")
        self._pause.on_click(lambda _: self._in_thread(self._end, "paused"))
        self._stop.on_click(lambda _: self._in_thread(self._end, "stopped"))
        self._resume.on_click(lambda _: self._in_thread(self._go_on))
        self.controls = ipywidgets.HBox([self._pause, self._stop])
        self.box = ipywidgets.VBox([self.page, self.controls])
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)
        self._settled = threading.Lock()  # held until a run that is stopped has its last state

    @staticmethod
    def _button(name: str, icon: str, tooltip: str) -> Any:
        import ipywidgets

        button = ipywidgets.Button(description=name, icon=icon, tooltip=tooltip)
        button.add_class(f"sx-{name.lower()}")
        return button

    @staticmethod
    def _in_thread(work: Callable[..., None], *given: Any) -> None:
        threading.Thread(target=work, args=given, name="live view button", daemon=True).start()

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the run has ended."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # an interrupt is heard between two waits

    def _end(self, state: str) -> None:
        self._pause.disabled = self._stop.disabled = True
        button = self._pause if state == "paused" else self._stop
        name, button.description = button.description, "Saving …"
        with self._settled, contextlib.suppress(StageError):  # it has just ended
            stop_run(self._run, state=state)
        button.description = name

    def _go_on(self) -> None:
        self._resume.disabled = True
        try:
            start_on(self._run, *self._command)
        except (StrixftError, OSError) as error:
            self.page.value = shown_error(error)
            self._ended()
            return
        finally:
            self._resume.disabled = False
        self._pause.disabled = self._stop.disabled = False
        self.controls.children = [self._pause, self._stop]
        self._resumed()
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)
        self._thread.start()

    def _resumed(self) -> None:
        """Called when the run has been resumed."""

    def _follow(self) -> None:
        for view in views(self._run):
            text = to_html(view, cell_fix)
            if text != self.page.value:
                self.page.value = text
        with self._settled:
            view = self._run.observer().look()
        self.page.value = to_html(view, cell_fix)
        self.controls.children = [self._resume] if view.state in RESUMABLE else []
        self._ended()


class LiveView(LivePanel):
    """A run in a cell, replaced in place.

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

        super().__init__(run, self._finish, command=command)
        self._ending, self._after = ending, after
        self._handle = display(self.page, display_id=True)
        self._below = ipywidgets.VBox([self.controls])
        display(self._below)
        self.start()

    def _finish(self) -> None:
        self._handle.update(_as_html(self.page.value + self._ending()))
        shown = None if self.controls.children else self._after()
        self._below.children = [self.controls] if shown is None else [shown]

    def _resumed(self) -> None:
        self._handle.update(self.page)


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
            live.update(Group(Text("\n".join(lines(view))), bar))  # a bar ends without a line


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
