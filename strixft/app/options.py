"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_debugging: set[str] = set()
"""Holds `traceback` after `--debug`."""


def _set_debug(value: bool) -> None:
    _debugging.clear()
    if value:
        _debugging.add("traceback")


def shows_traceback() -> bool:
    """Return whether `--debug` was given."""
    return bool(_debugging)


RecipeArgument = Annotated[str, typer.Argument(help="Recipe: a name or a path; or a run folder.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Run folder; runs/<recipe> if not given.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: key=value, repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show a traceback on errors.")
]
Detach = Annotated[
    bool,
    typer.Option("--detach", help="Run in a process of its own, which outlives this terminal."),
]
RunArgument = Annotated[str, typer.Argument(help="Run: a name under runs/ or a folder.")]
