"""Work in a child process, step after step: what crashes or hangs there is found out here.

The child writes a line of JSON before and after each step, so what it had found out by then is
known however it ends.
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
"""How long a child may take to its first step, where steps have a limit: it imports torch."""

LOOK_S = 0.05
"""How often the parent looks at the child."""

KILLED_S = 10.0
"""How long a killed child may take to end: one that a driver holds may never do."""


Ended = Literal["done", "crashed", "timed out", "no torch"]

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a child found out, and how it ended."""

    ended: Ended
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Figures by step; `problem` where a step failed, `skipped` where it does not apply."""
    at: str = ""
    """The step it was in when it crashed or ran out of time."""
    how: str = ""
    """Signal or exit code, and the last line it wrote."""

    def problem(self, step: str) -> str | None:
        """What went wrong in a step, or None."""
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
            continue  # the line it was writing when it died
        if "begin" in row:
            begun = row["begin"]
        else:
            steps[row["step"]], begun = row["figures"], ""
    return steps, begun


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _death(code: int, errors: str) -> str:
    try:
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        cause = f"signal {-code}"
    return ": ".join(filter(None, (cause, _last_line(errors))))


def _wait(child: subprocess.Popen[bytes], output: Path, limit_s: float, step_limit_s: float) -> str:
    """Wait for its end; which limit it ran into, or nothing."""
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


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILLED_S)


def run_steps(
    command: Sequence[str],
    limit_s: float = float("inf"),
    step_limit_s: float = float("inf"),
    first: str = "import",
) -> Probe:
    """Run a child and collect what it found out.

    Args:
        command: What to run; it gets the output file as its last word.
        limit_s: It is ended after this time.
        step_limit_s: It is ended when a step takes longer; see also `START_LIMIT_S`.
        first: What it is at before the first step.
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
                _kill(child)
        steps, at = _read_steps(output)
        if limit:
            return Probe(ended="timed out", steps=steps, at=at or first, how=limit)
        if child.returncode == 0 and not at:
            return Probe(ended="done", steps=steps)
        how = _death(child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    return Probe(ended="crashed", steps=steps, at=at or first, how=how)


def _figures_of(work: Callable[[], Figures]) -> Figures:
    began = time.perf_counter()
    try:
        figures = work()
    except ImportError as error:
        figures = {"skipped": f"{error.name or error} is not installed"}
    except Exception as error:  # whatever torch raises is what we came to see
        figures = {"problem": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        if is_out_of_memory(error):
            figures["out_of_memory"] = True
    return {**figures, "seconds": round(time.perf_counter() - began, 2)}


def do_steps(output: Path, work: Mapping[str, Callable[[], Figures]]) -> None:
    """The child's part: do every step, with a line before it and a line after it.

    A step that raises is noted and the next one goes on; a step that kills the process leaves its
    name behind.

    Args:
        output: The file that the parent reads.
        work: What to do, by the names of the steps.
    """
    with output.open("a", encoding="utf-8") as file:
        for name, do in work.items():
            print(json.dumps({"begin": name}), file=file, flush=True)
            row = {"step": name, "figures": _figures_of(do)}
            print(json.dumps(row), file=file, flush=True)
