"""Everything that watches over a stage, started and ended together."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strixft.guard.hang import HangWatch
from strixft.guard.host import training_host
from strixft.guard.watch import MemoryWatch
from strixft.run.folder import Run
from strixft.support.errors import StrixftError
from strixft.support.signals import Signals, on_signals
from strixft.support.units import GIB

STACKS = "stacks.txt"

ROOT = Path("/")
"""Where `/proc` and `/sys` are found."""


class StageWatch:
    """Watches over the host's memory during a stage, and says when the stage should end.

    Args:
        run: Whose stage it is.
        looks: The stage calls `look` or `is_asked` again and again; if not, this process ends
            where it would be asked to, and the stage begins again next time.
    """

    def __init__(self, run: Run, *, looks: bool = True) -> None:
        self.run = run
        self.warnings: list[str] = []
        self.asked: StrixftError | None = None
        """Why the host needs the stage to end."""
        ask = self._ask if looks else run.leave
        self.memory = MemoryWatch(
            _reserve_bytes(run), warn=self.warn, ask=ask, leave=run.leave, root=ROOT
        )

    def warn(self, text: str) -> None:
        """Tell the user of something that does not end the stage."""
        self.warnings.append(text)
        self.run.tell(warnings=self.warnings)

    def _ask(self, error: StrixftError) -> None:
        self.asked = error

    def look(self) -> None:
        """Raise what the host asks for; between two batches of a stage that saves nothing.

        Raises:
            FitError: The host is about to run out of memory.
        """
        if self.asked is not None:
            raise self.asked

    @contextlib.contextmanager
    def watching_memory(self) -> Iterator[dict[str, Any]]:
        """Watch while a block runs.

        Yields:
            What was seen, complete after the block.

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
    """What asks a training to stop, and what was seen meanwhile."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.signals: Signals | None = None
        self.hang = HangWatch(run.stage_folder("train") / STACKS, run.leave)

    def is_asked(self) -> bool:
        """Somebody wants the training to stop."""
        return self.asked is not None or bool(self.signals and self.signals.asked)

    def stop_error(self, update: int, updates: int) -> StrixftError:
        """Why the training stopped, and what is on disk.

        Args:
            update: The last one that is finished.
            updates: Of the whole training.
        """
        saved = f"update {update} of {updates} is saved" if update else "no update was finished"
        if self.asked is not None:
            fix = f"{self.asked.fix}\n     or with more memory free: {self.run.resume_command}"
            return type(self.asked)(f"{self.asked.problem}; {saved}", fix=fix)
        asked = self.signals.asked if self.signals else None
        return self.run.stopped(f"{asked} came, {saved}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict[str, Any]]:
        """Watch while a block runs.

        Yields:
            What was seen, complete after the block.

        Raises:
            FitError: The host has too little memory left to begin.
        """
        with self.watching_memory() as seen, self.hang, on_signals(lambda _: None) as signals:
            self.signals = signals
            yield seen


def _reserve_bytes(run: Run) -> int:
    """The recipe's reserve where device and host share memory, else none."""
    here = training_host()
    return round(run.recipe.memory.reserve_gib * GIB) if here.unified else 0


COMMAND = ("--what=sleep:idle", "--who=strixft", "--why=training a model", "--mode=block", "cat")
"""`cat` ends when this process does, however it ends, and the lock with it."""

REFUSED_S = 0.2


@contextlib.contextmanager
def sleep_inhibited() -> Iterator[bool]:
    """Keep the machine awake while a block runs, where systemd is there.

    Yields:
        Whether it is kept awake.
    """
    program = shutil.which("systemd-inhibit")
    if program is None:
        yield False
        return
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        [program, *COMMAND],
        stdin=subprocess.PIPE,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    ) as process:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REFUSED_S)  # it ends at once where no systemd answers
            yield process.poll() is None
        finally:
            process.terminate()
