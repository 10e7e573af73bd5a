"""Progress bars in a terminal and in a notebook, and lines that leave them whole."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def _in_notebook() -> bool:
    """This process is a kernel; that something has imported its package is not enough."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """A progress bar of tqdm; silent where standard error is a file or a pipe.

    Args:
        iterable: What to go through, or None.
        options: As `tqdm.tqdm` takes them.
    """
    shown = _in_notebook() or sys.stderr.isatty()
    return tqdm(iterable, disable=not shown, **options)


def say(text: str) -> None:
    """A line on standard error, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)
