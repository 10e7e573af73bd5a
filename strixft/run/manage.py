"""Runs named anew, noted, and put into a bin and back; a run at work is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from strixft.recipe.find import workspace
from strixft.run.folder import DRIVER, LOCK, Result, Run
from strixft.run.live import RESUMABLE
from strixft.run.open import find_runs, free_name, run_folders
from strixft.run.show import counted
from strixft.support.errors import HostError, StageError, StrixftError
from strixft.support.files import free_aside, write_text
from strixft.support.locks import hold
from strixft.support.tables import did_you_mean
from strixft.support.text import typed
from strixft.support.units import format_size

BIN = ".bin"
"""Folder beside runs that holds those that were deleted."""

NOTE = "note.txt"

EXPORTED = ("export/result.json", "export/Modelfile", "export/merged/README.md")
"""Files that name the run's own folder."""


def run_bytes(folder: Path) -> int:
    """Return the bytes that the files of a folder take; a file of several names counts once."""
    found: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a run at work removes files meanwhile
            stat = path.lstat()
            found[stat.st_dev, stat.st_ino] = stat.st_size if path.is_file() else 0
    return sum(found.values())


def read_note(folder: Path) -> str:
    """Return the note of a run; empty if it has none or cannot be read."""
    try:
        return (folder / NOTE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def list_runs() -> list[dict[str, Any]]:
    """Return each run of the workspace, damaged ones included, by name.

    They have name, model, `status.json`, folder, `bytes`, `note`, and once it is known `loss` of
    the held-out rows, of base and tuned model.
    """
    runs = {run.folder: _listed(run) for run in find_runs()}
    damaged = {"stage": None, "state": "unreadable"}
    return [
        {
            "run": folder.name,
            **runs.get(folder, damaged),
            "folder": str(folder),
            "bytes": run_bytes(folder),
            "note": read_note(folder),
        }
        for folder in run_folders()
    ]


def _listed(run: Run) -> dict[str, Any]:
    loss = None
    with contextlib.suppress(StrixftError, KeyError, TypeError):  # damaged, or of another version
        evaluated = Result.load(run.stage_folder("evaluate"))
        loss = evaluated and evaluated.figures["metrics"]["loss"]
        loss = loss and {variant: float(loss[variant]) for variant in ("base", "tuned")}
    return {"model": run.recipe.model, **run.status(), **({"loss": loss} if loss else {})}


RUN_HEADER = ["run", "model", "stage", "state", "done", "loss, base → tuned", "size", "updated"]


def run_row(row: Mapping[str, Any]) -> list[str]:
    """Return a row of `list_runs` as cells for people, under `RUN_HEADER`; times are local."""
    doing, loss = row.get("doing"), row.get("loss")
    is_open = row["state"] in ("running", *RESUMABLE)
    doing = doing if isinstance(doing, dict) and is_open else {}
    of = counted(doing) if doing.get("total") else "–"
    return [
        row["run"],
        Path(row.get("model", "–")).name,
        str(row.get("stage") or "–"),
        str(row["state"]),
        of,
        f"{loss['base']:.3f} → {loss['tuned']:.3f}" if loss else "–",
        format_size(row["bytes"]),
        _local(row.get("updated")),
    ]


def _local(time: object) -> str:
    """Return a time of `status.json` on this machine's clock; a dash if it is not one."""
    try:
        return f"{datetime.fromisoformat(str(time)).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return "–"


def note_run(run: Run, text: str) -> None:
    """Write the note of a run; an empty one removes it.

    Raises:
        HostError: It cannot be written.
    """
    with _writing(run.folder):
        if text.strip():
            write_text(run.folder / NOTE, text.strip() + "\n")
        else:
            (run.folder / NOTE).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"{folder} cannot be changed: {error.strerror}",
            fix=f"ls -ld {typed(folder)} {typed(folder.parent)}   shows owner and permissions",
        ) from error


@contextlib.contextmanager
def _at_rest(folder: Path) -> Iterator[None]:
    """Hold a run's locks, so that nothing begins to work on it.

    Raises:
        StageError: A process works on it.
    """
    with (
        hold(folder / DRIVER, folder, patience_s=0),
        hold(folder / LOCK, folder, patience_s=0),
    ):
        yield


def require_name(name: str) -> None:
    """Require a name that is a folder, a word of a command, and shown among runs.

    Raises:
        StageError: It is not.
    """
    if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        raise StageError(
            f"{name!r} is not a name for a run",
            fix="letters, digits, dots, hyphens and underscores, such as my-run-2",
        )


def rename_run(run: Run, name: str) -> Path:
    """Rename the folder of a run, and return it.

    Raises:
        StageError: A process works on the run, or the name is taken or not a name.
        HostError: The folder cannot be renamed.
    """
    require_name(name)
    target = run.folder.with_name(name)
    if target.exists():
        raise StageError(f"{target} exists", fix=f"choose another name: {free_name(target).name}")
    with _at_rest(run.folder), _writing(run.folder):
        run.folder.rename(target)
        for file in filter(Path.is_file, map(target.joinpath, EXPORTED)):
            old, new = (json.dumps(str(path))[1:-1] for path in (run.folder, target))
            write_text(file, file.read_text(encoding="utf-8").replace(f"{old}/", f"{new}/"))
    return target


def delete_run(folder: Path) -> Path:
    """Move a run into the bin beside it, and return its place there.

    Args:
        folder: Its folder; its recipe may be damaged.

    Raises:
        StageError: A process works on the run.
        HostError: The folder cannot be moved.
    """
    target = folder.parent / BIN / folder.name
    target = free_aside(target) if target.exists() else target
    with _at_rest(folder), _writing(folder):
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    return target


def binned() -> list[Path]:
    """Return the folders in the workspace's bin, by name."""
    return sorted(path for path in (workspace() / "runs" / BIN).glob("*") if path.is_dir())


def restore_run(name: str) -> Path:
    """Move a run out of the bin, and return its folder.

    Args:
        name: Its name in the bin, or its folder there.

    Raises:
        StageError: It is not in the bin, or another run has its name.
        HostError: The folder cannot be moved.
    """
    found = Path(name) if os.sep in name else workspace() / "runs" / BIN / name
    if found.parent.name != BIN or not found.is_dir():
        names = [path.name for path in binned()]
        raise StageError(f"there is no run {name!r} in the bin", fix=did_you_mean(name, names))
    target = found.parent.parent / found.name
    if target.exists():
        fix = f"strixft rename {typed(target)} {typed(free_name(target).name)}   and again"
        raise StageError(f"another run has the name {found.name}", fix=fix)
    with _writing(found):
        found.rename(target)
    return target
