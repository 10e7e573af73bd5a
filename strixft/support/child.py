"""Work in a child process, step after step, that survives crashes and hangs of the child.

The child writes a line of JSON before and after each step, so its earlier results are known however
it ends.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from strixft.support.errors import is_out_of_memory

START_LIMIT_S = 180.0
"""Limit until the first step, where steps have a limit: the child imports torch."""

LOOK_S = 0.05
"""Interval at which the parent looks at the child."""

KILLED_S = 10.0
"""Time for a killed child to end: a driver can hold it forever."""


Ended = Literal["done", "crashed", "timed out", "no torch"]

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Results of a child, and its end."""

    ended: Ended
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Figures by step; `problem` where a step failed, `skipped` where it does not apply."""
    at: str = ""
    """The step in which it crashed or ran out of time."""
    how: str = ""
    """Signal or exit code, and the last line of its output."""

    def problem(self, step: str) -> str | None:
        """Return the problem of a step, or None."""
        text = self.steps.get(step, {}).get("problem")
        if text is None and self.at == step:
            return f"{self.ended} ({self.how})"
        return None if text is None else str(text)


def _read_steps(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Figures by step, and the step that began and did not end."""
    steps: dict[str, dict[str, Any]] = {}
    begun = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # an incomplete line: the child died while writing it
        if "begin" in row:
            begun = row["begin"]
        else:
            steps[row["step"]], begun = row["figures"], ""
    return steps, begun


def _death(code: int, errors: Path) -> str:
    try:
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        cause = f"signal {-code}"
    lines = errors.read_text(encoding="utf-8", errors="replace").split("\n")
    written = [line.strip() for line in lines if line.strip()]
    return f"{cause}: {written[-1][:300]}" if written else cause


def _wait(child: subprocess.Popen[bytes], output: Path, limit_s: float, step_limit_s: float) -> str:
    """Wait for the end of the child; the limit that it reached, or an empty text."""
    began = moved = time.monotonic()
    size = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_S)
            return ""
        now, grown = time.monotonic(), output.stat().st_size
        if grown != size:
            size, moved = grown, now
        most = step_limit_s if size else max(step_limit_s, START_LIMIT_S)
        for spent, limit in ((now - began, limit_s), (now - moved, most)):
            if spent > limit:
                return f"{limit:g} s"


def run_steps(
    command: Sequence[str],
    limit_s: float = float("inf"),
    step_limit_s: float = float("inf"),
    first: str = "import",
) -> Probe:
    """Run a child and collect its results.

    Args:
        command: The child; the output file is appended as its last argument.
        limit_s: Time after which it is killed.
        step_limit_s: Time of one step after which it is killed; see also `START_LIMIT_S`.
        first: Name of the step to report before the first step begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "steps.jsonl", Path(folder) / "errors"
        output.touch()
        with errors.open("wb") as file:
            child = subprocess.Popen(
                [*command, str(output)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
            try:
                limit = _wait(child, output, limit_s, step_limit_s)
            finally:
                child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(KILLED_S)
        steps, at = _read_steps(output)
        if limit:
            return Probe(ended="timed out", steps=steps, at=at or first, how=limit)
        if child.returncode == 0 and not at:
            return Probe(ended="done", steps=steps)
        how = _death(child.returncode, errors)
    return Probe(ended="crashed", steps=steps, at=at or first, how=how)


def _figures_of(work: Callable[[], Figures]) -> Figures:
    began = time.perf_counter()
    try:
        figures = work()
    except ImportError as error:
        figures = {"skipped": f"{error.name or error} is not installed"}
    except Exception as error:  # errors of torch are results here
        figures = {"problem": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        if is_out_of_memory(error):
            figures["out_of_memory"] = True
    return {**figures, "seconds": round(time.perf_counter() - began, 2)}


def do_steps(output: Path, work: Mapping[str, Callable[[], Figures]]) -> None:
    """Take every step, in the child, with a line before it and a line after it.

    A step that raises is recorded, and the next one follows; a step that kills the process leaves
    its name behind.

    Args:
        output: The file that the parent reads.
        work: Functions by the names of the steps.
    """
    with output.open("a", encoding="utf-8") as file:
        for name, do in work.items():
            print(json.dumps({"begin": name}), file=file, flush=True)
            row = {"step": name, "figures": _figures_of(do)}
            print(json.dumps(row), file=file, flush=True)
