"""What was measured here: one JSON line a bench, only ever appended to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from strixft.bench.result import Measured
from strixft.catalog.rates import FOLDER, data_folder
from strixft.support.errors import HostError


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds."""

    results: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Lines that cannot be read, each with its number and the reason; they stay where they are."""


def store_file() -> Path:
    """Where results are appended."""
    return data_folder() / "bench.jsonl"


def _ends_whole(path: Path) -> bool:
    """Whether the last line was written to its end."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def require_store() -> None:
    """Find out before anything is measured that results can be kept.

    Raises:
        HostError: They cannot.
    """
    path = store_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}",
            fix=f"--no-save, or another folder: export {FOLDER}=~/strixft-data",
        ) from error


def append(result: Measured) -> Path:
    """Add a result as one line, in one write; what stands there is not touched."""
    require_store()
    path = store_file()
    line = json.dumps(result.to_dict(), ensure_ascii=False) + "\n"
    start = "" if _ends_whole(path) else "\n"
    with path.open("ab", buffering=0) as file:
        file.write((start + line).encode())
        os.fsync(file.fileno())
    return path


def read_store() -> Stored:
    """All results that this version can read, the oldest first."""
    path, stored = store_file(), Stored()
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            stored.results.append(Measured.from_dict(json.loads(line)))
        except (ValueError, AttributeError) as error:
            stored.left_out.append(f"{path}, line {number}: {error}")
    return stored
