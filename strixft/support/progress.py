"""Progress bars for terminals and notebooks that others can follow, and lines that keep them whole.

A bar in a notebook is plain HTML, which stays as it was when the notebook is opened again.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from tqdm import tqdm

Follower = Callable[[dict[str, Any]], None]
"""Called with `what`, `done`, `total` or None, `unit`, `elapsed_s`, and figures that were noted."""

_followers: list[Follower] = []


@contextlib.contextmanager
def following(tell: Follower) -> Iterator[None]:
    """Call a function with the state of each bar whenever it changes, while a block runs."""
    _followers.append(tell)
    try:
        yield
    finally:
        _followers.remove(tell)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None  # imported alone is not enough


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Bar(tqdm):  # type: ignore[type-arg]
    """Shows itself on a terminal or in a notebook, and tells its followers."""

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self.noted: dict[str, Any] = {}
        self._handle: Any = None
        self._on_terminal = sys.stderr.isatty()
        if not self._on_terminal:
            options["file"] = _Nowhere()
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        found = self.format_dict
        state = {"what": found["prefix"] or "", "done": found["n"], "total": found["total"]}
        state |= {"unit": found["unit"].strip(), "elapsed_s": round(found["elapsed"], 1)}
        state |= self.noted
        for tell in list(_followers):
            tell(state)
        if self._on_terminal:
            super().display(msg, pos)
        elif _in_notebook():
            self._show(msg or str(self))
        return True

    def note(self, **figures: Any) -> None:
        """Show figures beside the bar from its next change on, and tell them its followers."""
        self.noted = figures
        self.set_postfix(figures, refresh=False)

    def _show(self, text: str) -> None:
        from IPython.display import HTML, display

        page = HTML(f"<pre>{escape(text)}</pre>")
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def close(self) -> None:
        if self._handle is not None and not self.disable:
            self._show(str(self))
        super().close()


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """Return a tqdm progress bar; only followers see it where standard error is a file or a pipe.

    Args:
        iterable: The items to iterate over, or None.
        options: Arguments of `tqdm.tqdm`.
    """
    return _Bar(iterable, **options)


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
