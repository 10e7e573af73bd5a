"""What to type against faults of a file that leaving out single rows would not mend."""

from __future__ import annotations

import shlex
from pathlib import Path

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


def to_utf8(file: str) -> str | None:
    """The fix for text that is not UTF-8; None for Parquet, which is no text.

    >>> to_utf8("a.csv")
    'iconv -f WINDOWS-1252 -t UTF-8 a.csv > NEW.csv   makes it UTF-8 if it is Windows-1252'
    """
    endings = [ending for ending in Path(file.lower()).suffixes if ending not in UNPACK]
    ending = endings[-1] if endings else ""
    if ending == ".parquet":
        return None
    command = _on("iconv -f WINDOWS-1252 -t UTF-8", file)
    return f"{command} > NEW{ending}   makes it UTF-8 if it is Windows-1252"
