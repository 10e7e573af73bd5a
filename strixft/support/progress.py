"""Progress bars for terminals and notebooks, and lines that do not break them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None  # imported alone is not enough


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """Return a tqdm progress bar; it stays silent where standard error is a file or a pipe.

    Args:
        iterable: The items to iterate over, or None.
        options: Arguments of `tqdm.tqdm`.
    """
    shown = _in_notebook() or sys.stderr.isatty()
    return tqdm(iterable, disable=not shown, **options)


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
