"""What to type against faults of a file that leaving out single rows would not mend."""

from __future__ import annotations

import shlex

UNPACK = {".gz": "zcat", ".zst": "zstdcat"}
"""Ending of a packed file → what writes its text."""


def _on(command: str, file: str) -> str:
    """A command on a file's text."""
    name = shlex.quote(file)
    tool = next((tool for ending, tool in UNPACK.items() if file.lower().endswith(ending)), None)
    return f"{tool} {name} | {command}" if tool else f"{command} {name}"


def close_quote(file: str, row: int) -> str:
    """The fix for a row of CSV that has a quote too few.

    >>> close_quote("a.csv.gz", 7)
    'zcat a.csv.gz | sed -n 7p   shows where the row begins; close its quote (one in a cell is "")'
    """
    shown = _on(f"sed -n {row}p", file)
    return f'{shown}   shows where the row begins; close its quote (one in a cell is "")'
