"""Progress bar, log and speed of a training."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from strixft.run.folder import Run
from strixft.run.log import LOG, Record, append, busy_seconds
from strixft.step.memory_tracker import memory_now
from strixft.support.progress import progress_bar
from strixft.train.held_out import Evaluation
from strixft.train.loop import Progress
from strixft.train.trackers import Trackers


class ProgressLog:
    """Shows and logs updates and evaluations.

    Args:
        run: The run.
        updates: Updates of the whole training.
        trackers: Get the same figures.
    """

    def __init__(self, run: Run, updates: int, trackers: Trackers) -> None:
        self._trackers = trackers
        self._updates = updates
        self._log = run.stage_folder("train") / LOG
        self.busy_s = self.earlier_s = 0.0
        """Time of the finished updates, in earlier processes too; and in those alone."""
        self._warm: tuple[float, int] | None = None
        self._bar: Any = None

    def close(self) -> None:
        """Close the trackers, and the bar, if there was an update."""
        self._trackers.close()
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress, record: Record) -> None:
        """Log and show an update; the clock starts after the first, which compiles and warms up."""
        is_first = self._warm is None
        if self._warm is None:
            initial = progress.update - 1
            self.busy_s = self.earlier_s = busy_seconds(self._log, initial)
        self.busy_s += record["seconds"]
        if self._warm is None:
            self._warm = self.busy_s, progress.tokens
            self._bar = progress_bar(
                total=self._updates, initial=initial, unit="update", desc="train"
            )
        rate = self.tok_per_s(progress)
        record |= {"time": round(time.time(), 3), "clock_s": round(time.monotonic(), 3)}
        record["busy_s"] = round(self.busy_s, 3)
        record |= {"tokens": progress.tokens, "tok_per_s": rate, **memory_now()}
        with contextlib.suppress(OSError):  # the checkpoint reports a full disk
            append(self._log, record | ({"first": True} if is_first else {}))
        self._trackers.log(record)
        self._bar.note(loss=round(record["loss"], 3), tok_per_s=rate)
        self._bar.update(progress.update - self._bar.n)

    def note_evaluation(self, evaluation: Evaluation) -> None:
        """Log and show a held-out loss."""
        with contextlib.suppress(OSError):
            append(self._log, evaluation | {"time": round(time.time(), 3)})
        self._trackers.log(evaluation)
        if self._bar is not None and (loss := evaluation["held_out_loss"]) is not None:
            self._bar.note(held_out=round(loss, 3))

    def tok_per_s(self, progress: Progress) -> float | None:
        """Return real tokens per second since the first update of this process, if any."""
        began, tokens = self._warm or (0.0, progress.tokens)
        if progress.tokens == tokens:
            return None
        return round((progress.tokens - tokens) / (self.busy_s - began), 1)
