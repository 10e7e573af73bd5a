"""The watches over a stage, started and ended together."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strixft.guard.host import training_host
from strixft.guard.sensors import read_sensors
from strixft.guard.watch import Counters, HangWatch, MemoryWatch
from strixft.run.folder import Run
from strixft.support.errors import StrixftError
from strixft.support.signals import Signals, on_signals
from strixft.support.units import GIB

ROOT = Path("/")
"""Folder that holds `/proc` and `/sys`."""

TOLD_EVERY_S = 5.0
"""Seconds between two notes of the host's state."""


class StageWatch:
    """Watches over the host's memory during a stage, and says when the stage should end.

    Args:
        run: The run of the stage.
        looks: The stage calls `look` or `is_asked` again and again; otherwise this process ends
            itself instead of being asked to, and the stage begins again next time.
    """

    def __init__(self, run: Run, *, looks: bool = True) -> None:
        self.run = run
        self.warnings: list[str] = []
        self.asked: StrixftError | None = None
        """Reason for the host to end the stage."""
        ask = self._ask if looks else run.leave
        host = training_host()
        reserve = round(run.recipe.memory.reserve_gib * GIB) if host.unified else 0
        self._device, self._told = host.device, -math.inf
        self.memory = MemoryWatch(
            reserve, warn=self.warn, ask=ask, leave=run.leave, tell=self._tell, root=ROOT
        )

    def warn(self, text: str) -> None:
        """Warn the user of something that does not end the stage."""
        self.warnings.append(text)
        self.run.set_status(warnings=self.warnings)

    def _tell(self, now: Counters) -> None:
        """Put the host's memory, and the device's temperature and power, into the run's status."""
        if time.monotonic() - self._told > TOLD_EVERY_S:
            self._told = time.monotonic()
            host = {"left_bytes": now.left_bytes, **read_sensors(self._device, ROOT)}
            self.run.set_status(flush=False, host=host)

    def _ask(self, error: StrixftError) -> None:
        self.asked = error

    def look(self) -> None:
        """Raise the host's error, if any; a stage without checkpoints calls this between batches.

        Raises:
            FitError: The host is about to run out of memory.
        """
        if self.asked is not None:
            raise self.asked

    @contextlib.contextmanager
    def watching_memory(self) -> Iterator[dict[str, Any]]:
        """Watch while a block runs.

        Yields:
            Figures, complete after the block.

        Raises:
            FitError: The host has too little memory left to begin.
        """
        self.memory.require_reserve()
        seen: dict[str, Any] = {}
        with sleep_inhibited() as kept, self.memory:
            yield seen
        seen |= {
            "kept_awake": kept,
            "least_left_bytes": self.memory.least_left_bytes,
            "warnings": self.warnings,
        }


class Watches(StageWatch):
    """The watches that can ask a training to stop, and their figures."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.signals: Signals | None = None
        self.hang = HangWatch(run.stage_folder("train") / "stacks.txt", run.leave)

    def is_asked(self) -> bool:
        """Return whether the training should stop."""
        return self.asked is not None or bool(self.signals and self.signals.asked)

    def stop_error(self, update: int, updates: int) -> StrixftError:
        """Return the error of a training that stopped, with its state on disk.

        Args:
            update: The last finished update.
            updates: Updates of the whole training.
        """
        saved = f"update {update} of {updates} is saved" if update else "no update was finished"
        if self.asked is not None:
            fix = f"{self.asked.fix}\n     or with more memory free: {self.run.resume_command}"
            return type(self.asked)(f"{self.asked.problem}; {saved}", fix=fix)
        asked = self.signals.asked if self.signals else None
        return self.run.stopped(f"received {asked}, {saved}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """Watch while a block runs.

        Yields:
            Figures, complete after the block.

        Raises:
            FitError: The host has too little memory left to begin.
        """
        with self.watching_memory() as seen, self.hang, on_signals(lambda _: None) as signals:
            self.signals = signals
            yield seen


COMMAND = ("--what=sleep:idle", "--who=strixft", "--why=training a model", "--mode=block", "cat")
"""`cat` ends when this process does, in whatever way, and the lock with it."""

REFUSED_S = 0.2
"""Time after which systemd is taken to have accepted the lock."""


@contextlib.contextmanager
def sleep_inhibited() -> Iterator[bool]:
    """Keep the machine awake while a block runs, if it has systemd.

    Yields:
        Whether the machine is kept awake.
    """
    program = shutil.which("systemd-inhibit")
    if program is None:
        yield False
        return
    command, quiet, pipe = [program, *COMMAND], subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=quiet, stderr=quiet, start_new_session=True
    ) as process:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REFUSED_S)  # it ends at once if no systemd answers
            yield process.poll() is None
        finally:
            process.terminate()
