"""Losses and speed to other programs, through accelerate's trackers; and to `train/log.csv`.

One that fails is left alone from then on: it never ends a training. A training that is resumed goes
on in the same run of the other program; one that begins anew gets another.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import (
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from strixft.recipe.load import flatten
from strixft.run.folder import Run
from strixft.run.log import LOG, LogReader, Record
from strixft.support.files import write_text
from strixft.support.text import redact_all

FOLDER, CSV = "trackers", "log.csv"
"""Names in `train/`: what trackers without a place of their own write, and the table."""

LOGGED = (
    "loss", "learning_rate", "grad_norm", "tok_per_s", "tokens", "seconds", "held_out_loss",
    "general_loss",
)  # fmt: skip
"""Figures of an update or an evaluation that trackers get."""


class CsvTracker:
    """A table with a line for each update and each evaluation; has what accelerate's trackers have.

    Args:
        path: The file.
        update: The last update that stays: a training that was resumed repeats those that follow.
    """

    def __init__(self, path: Path, update: int) -> None:
        self._path, self._update = path, update

    def start(self) -> None:
        """Keep the lines of the updates that stay, and write the header."""
        old = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        kept = [line for line in old[1:] if self._stays(line)]
        lines = (",".join(("update", *LOGGED)), *kept)
        write_text(self._path, "".join(f"{line}\n" for line in lines))

    def _stays(self, line: str) -> bool:
        number = line.partition(",")[0]
        return number.isdecimal() and line.count(",") == len(LOGGED) and int(number) <= self._update

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Leave settings out: `recipe.yaml` has them."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8", newline="") as file:
            line = [step, *(values.get(name) for name in LOGGED)]
            csv.writer(file, lineterminator="\n").writerow(line)

    def finish(self) -> None:
        """Do nothing: each line is written at once."""


APPEND_ONLY = ("trackio", "wandb", "mlflow")
"""Trackers that cannot take back an update which a resumed training repeats."""


def _kept_id(path: Path) -> str:
    """Return the name of a training in another program; the first time, it is drawn.

    A training that begins anew has a new folder, and so another one.
    """
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


class _MLflow(MLflowTracker):  # type: ignore[misc]
    """Goes on in the run whose number is in a file.

    Args:
        path: The file.
        project: Name of the experiment.
        name: Name of a new run.
    """

    def __init__(self, path: Path, project: str, name: str) -> None:
        known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        super().__init__(project, run_name=name, run_id=known)
        self._path, self._is_known = path, known is not None

    def start(self) -> None:
        """Start the run, and keep its number."""
        super().start()
        write_text(self._path, self.tracker.info.run_id)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store settings once: MLflow refuses another value of one that it has."""
        if not self._is_known:
            super().store_init_configuration(values)


def _make(name: str, run: Run, update: int) -> Any:
    """Return a tracker of `TRACKERS` that was not started."""
    folder, project = run.stage_folder("train"), run.folder.parent.parent.name or "strixft"
    here = folder / FOLDER
    here.mkdir(exist_ok=True)
    of_run = run.folder.name
    if name == "csv":
        return CsvTracker(folder / CSV, update)
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", str(here), purge_step=update + 1)
    if name == "trackio":
        return TrackioTracker(project, name=f"{of_run}-{_kept_id(here / name)}", resume="allow")
    if name == "wandb":
        again = {"id": _kept_id(here / "wandb-id"), "resume": "allow"}
        return WandBTracker(project, name=of_run, dir=str(here), **again)
    return _MLflow(here / name, project, of_run)


class Trackers:
    """The trackers of a run.

    Args:
        run: The run, with their names in `train.trackers`.
        update: The last update whose figures stay, that of the checkpoint; -1 without one.
        warn: Told of a tracker that fails.
    """

    def __init__(self, run: Run, update: int, warn: Callable[[str], None]) -> None:
        self._warn, self._trackers = warn, dict[str, Any]()
        self._sent = LogReader(run.stage_folder("train") / LOG)
        self._sent.read()
        settings = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in redact_all(flatten(run.recipe.to_dict())).items()
        }
        for name in run.recipe.train.trackers if PartialState().is_main_process else ():
            self._try(name, partial(self._start, name, run, update, settings))

    def _start(self, name: str, run: Run, update: int, settings: Mapping[str, Any]) -> None:
        tracker = _make(name, run, update)
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        self._trackers[name] = tracker

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """Let a tracker do something; one that fails is told once, and left alone."""
        try:
            act()
        except Exception as error:  # another program's, of whatever kind
            self._trackers.pop(name, None)
            self._warn(f"{name} gets no more losses: {type(error).__name__}: {error}")

    def log(self, record: Record) -> None:
        """Send the figures of an update or an evaluation."""
        values = {name: record[name] for name in LOGGED if record.get(name) is not None}
        was_sent = self._was_sent(record)
        for name, tracker in list(self._trackers.items()):
            if not (was_sent and name in APPEND_ONLY):
                self._try(name, partial(tracker.log, values, step=record["update"]))

    def _was_sent(self, record: Record) -> bool:
        """Return whether an earlier process, whose checkpoint is older, has logged this already."""
        is_evaluation = "held_out_loss" in record
        before = self._sent.evaluations if is_evaluation else self._sent.points
        return bool(before) and record["update"] <= before[-1]["update"]

    def close(self) -> None:
        """Let all end; what they hold back is written."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
