"""Checkpoints: each is whole, or it is not there.

<folder>/checkpoint-<update>        what training wrote, and manifest.json with its hashes
<folder>/checkpoint-<update>.torn   set aside: it is not what its manifest says
<folder>/.writing                   the next one; flushed and hashed before it gets its name
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.recipe.load import flatten
from strixft.support.errors import StageError
from strixft.support.files import (
    digest,
    folder_bytes,
    free_bytes,
    read_manifest,
    require_room,
    sync,
    write_manifest,
)
from strixft.support.text import redact_all

KEPT = 2
"""Whole checkpoints that stay: the newest may turn out damaged."""

_NAME = re.compile(r"checkpoint-(\d+)")

_WRITING, _OLD = ".writing", ".old"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    update: int
    """Updates that were finished when it was written."""
    inputs: dict[str, Any]
    """Inputs of the run, as they were then."""


def _read(folder: Path, update: int) -> Checkpoint:
    """Return a checkpoint whose files are what its manifest says.

    Raises:
        ValueError: A file is missing or damaged.
    """
    manifest = read_manifest(folder)
    for name, written in sorted(manifest["files"].items()):  # others leave files: .DS_Store, .nfs…
        path = folder / name
        if ".." in path.parts or not path.is_file():
            raise ValueError(f"{name} is missing")
        if digest(path) != written:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(folder, update, manifest["inputs"])


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie.
        inputs: What the run depends on: recipe, data, plan and base model, with hashes.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder, self.inputs = folder, redact_all(dict(inputs))  # as it is written and read
        folder.mkdir(parents=True, exist_ok=True)
        before = sorted(path.name for path in folder.glob("*.torn*"))
        self.torn = [f"{name}: before this start" for name in before]
        """Checkpoints that were set aside, each with the reason."""
        self.set_aside: list[str] = []
        """Those of them that were set aside by this process."""
        for name in (_WRITING, _OLD):  # of a process that was killed
            shutil.rmtree(folder / name, ignore_errors=True)

    def _by_update(self) -> list[tuple[int, Path]]:
        """Return updates and folders of the checkpoints, newest first."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; torn ones that are newer are set aside.

        Raises:
            StageError: It was written by a run with other inputs.
        """
        for update, folder in self._by_update():
            try:
                checkpoint = _read(folder, update)
            except ValueError as fault:
                numbered = (f"{folder.name}.torn-{number}" for number in itertools.count(2))
                names = itertools.chain([f"{folder.name}.torn"], numbered)
                name = next(name for name in names if not folder.with_name(name).exists())
                folder.rename(folder.with_name(name))
                self.torn.append(f"{name}: {fault}")
                self.set_aside.append(self.torn[-1])
            else:
                self._require_same(checkpoint)
                return checkpoint
        return None

    def _require_same(self, checkpoint: Checkpoint) -> None:
        before, now = flatten(checkpoint.inputs), flatten(self.inputs)
        changed = [
            f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} here"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            run = self.folder.parent.parent
            raise StageError(
                f"{checkpoint.folder} was written by another run than this one; what differs:"
                f"{''.join(changed)}",
                fix="make it what it was, or begin training again:"
                f" strixft run {run / 'recipe.yaml'} --run-dir {run} --from train",
            )

    def count(self) -> int:
        """Return the number of checkpoints."""
        return len(self._by_update())

    def has(self, update: int) -> bool:
        """Return whether a checkpoint of this update has been written."""
        return (self.folder / f"checkpoint-{update}").is_dir()

    @contextlib.contextmanager
    def writing(self, update: int) -> Iterator[Path]:
        """Write a checkpoint; it gets its name when all of it is on disk.

        Args:
            update: Updates that are finished.

        Yields:
            A folder, in which the block writes the files.

        Raises:
            HostError: The disk has no room.
        """
        if kept := self._by_update():
            needed = folder_bytes(kept[0][1])
            if free_bytes(self.folder) < needed:  # the oldest makes room
                self._remove_old(1)
            require_room(self.folder, needed)
        folder = self.folder / _WRITING
        folder.mkdir()
        try:
            yield folder
            paths = sorted(folder.rglob("*"))
            for path in paths:
                sync(path)
            files = {str(p.relative_to(folder)): digest(p) for p in paths if p.is_file()}
            write_manifest(folder, {"files": files, "inputs": self.inputs})
            sync(folder)
            folder.rename(self.folder / f"checkpoint-{update}")
            sync(self.folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._remove_old(KEPT)

    def _remove_old(self, kept: int) -> None:
        for _, folder in self._by_update()[kept:]:
            old = self.folder / _OLD
            folder.rename(old)
            shutil.rmtree(old)
