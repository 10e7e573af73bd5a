"""Work beside a notebook's kernel: the newest of several jobs, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

Job = Callable[[Callable[[], bool]], None]
"""Does something; it is passed a function that tells whether a newer job waits."""


class Latest:
    """A thread that does the newest job; one that has not begun when another comes is dropped."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: Job | None = None
        self._at_work = False
        self._thread: threading.Thread | None = None

    def do(self, job: Job) -> None:
        """Do a job once the one at work has ended, unless a newer one comes before."""
        with self._condition:
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="form", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def is_outdated(self) -> bool:
        """Return whether a newer job waits."""
        return self._waiting is not None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do; return whether it is so."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._waiting is None and not self._at_work, timeout_s
            )

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self.is_outdated)
                job, self._waiting, self._at_work = self._waiting, None, True
            try:
                if job is not None:
                    job(self.is_outdated)
            finally:
                with self._condition:
                    self._at_work = False
                    self._condition.notify_all()
