"""Results on standard output, as tables or one JSON document; all else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from strixft.support.text import visible


def print_json(data: Any) -> None:
    """Print one JSON document."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(data, indent=2, ensure_ascii=not is_unicode))


def print_note(text: str) -> None:
    """Print a line for people on standard error."""
    print(text, file=sys.stderr)


NARROW = 80
"""Columns of a terminal below which tables leave out what they can."""


def print_table(
    rows: Iterable[Sequence[str]], header: Sequence[str], least: Sequence[str] = ()
) -> None:
    """Print a table in the terminal's width, in a pipe as wide as it is.

    Args:
        rows: Cells.
        header: Names of the columns.
        least: Those that a narrow terminal shows; all if not given.
    """
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 10_000  # do not fold lines in a pipe
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    is_narrow = bool(least) and console.width < NARROW
    kept = [index for index, name in enumerate(header) if not is_narrow or name in least]
    table = Table(box=None, pad_edge=False)
    for index in kept:
        table.add_column(header[index], overflow="fold")
    for row in rows:
        table.add_row(*(visible(row[index]) for index in kept))
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def print_tables(tables: Iterable[tuple[Iterable[Sequence[str]], Sequence[str]]]) -> None:
    """Print tables with an empty line after each."""
    for rows, header in tables:
        print_table(rows, header)
        print()


def print_entries(rows: Iterable[Sequence[str]]) -> None:
    """Print a name and a value in one line each, and below them a text that is folded."""
    width = min(100, shutil.get_terminal_size().columns)
    for name, value, text in rows:
        print(f"{name} = {visible(value)}")
        print(textwrap.fill(visible(text), width, initial_indent="    ", subsequent_indent="    "))


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something is done, and for how long, while a block runs."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        bar.add_task(what)
        yield


def coloured(text: str, colour: str, stream: Any = None) -> str:
    """Return a text in a colour where its stream is a terminal that shows colours.

    Args:
        text: One line or more.
        colour: A name of `COLOURS`.
        stream: Standard output if not given.
    """
    stream = sys.stdout if stream is None else stream
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


COLOURS = {"red": "31;1", "yellow": "33;1", "green": "32", "bold": "1"}
"""Name → numbers of the terminal's escape sequence."""
