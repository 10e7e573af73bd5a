"""A second process that makes every other trace of a plan: one processor is not enough for both.

It is a copy of this process, so it has what was imported and what the model's code was asked. Where
none can be made, or it ends early, the plan makes all traces itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

PATIENCE = 10
"""The helper is given up after so many times what a trace took here, and `LEAST_S`."""

LEAST_S = 20.0


def can_copy() -> bool:
    """Return whether a copy of this process is safe, and has a processor of its own."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return False  # not Linux, or nothing to gain
    return threading.active_count() == 1 and not torch.cuda.is_initialized()


def _serve(pipe: Any, of_plan: Any, act: Callable[..., object]) -> None:
    of_plan.close()  # else the plan's end of the pipe stays open when the plan is killed
    torch.set_num_threads(1)  # threads of OpenMP are not copied, and would be waited for
    with (
        contextlib.suppress(EOFError, OSError),  # the plan is done
        open(os.devnull, "w") as null,
        contextlib.redirect_stderr(null),
    ):
        while True:
            arguments = pipe.recv()
            with contextlib.suppress(Exception):  # the plan does it again, and tells
                act(*arguments)
            pipe.send(None)


class Helper:
    """Runs a function in another process, which leaves its result on disk.

    Args:
        act: The function.
    """

    def __init__(self, act: Callable[..., object]) -> None:
        self._act = act
        self._pipe: Any = None
        self._process: Any = None
        self._is_lost = not can_copy()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._pipe, self._act), daemon=True
        )
        with warnings.catch_warnings():  # of threads: torch's own, see `_serve`
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    @contextlib.contextmanager
    def beside(self, *arguments: Any) -> Iterator[None]:
        """Run the function with some arguments while this block runs, and wait for both."""
        began = time.monotonic()
        with self._ending():
            if self._process is None and not self._is_lost:
                self._start()
            if self._process is not None:
                self._pipe.send(arguments)
        yield
        with self._ending():
            limit_s = LEAST_S + PATIENCE * (time.monotonic() - began)
            if self._process is not None and not self._pipe.poll(limit_s):
                raise TimeoutError
            if self._process is not None:
                self._pipe.recv()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """End the other process where it was killed, hangs, or cannot be made."""
        try:
            yield
        except (EOFError, OSError):
            self.end()

    def end(self) -> None:
        """End the other process."""
        self._is_lost = True
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
