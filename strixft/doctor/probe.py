"""Asks torch, in a child process with a time limit: a crash or a hang there is a finding here.

The child (`strixft.doctor.probe_child`) writes a line of JSON before and after each step, so what
it had found out by then is known however it ends.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

STEPS = ("import", "nf4", "attention", "head", "step", "flex")
"""What the child does, in its order; what compiles longest comes last."""
LIMIT_S = 120.0
"""A first run on a new GPU compiles kernels; seconds are the rule."""

Ended = Literal["done", "crashed", "timed out", "no torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the child found out, and how it ended."""

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


def child_command(output: Path) -> list[str]:
    """How the child is started, with this interpreter."""
    return [sys.executable, "-m", "strixft.doctor.probe_child", str(output)]


def run_probe(limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> Probe:
    """Run the child and collect what it found out.

    Args:
        limit_s: It is ended after this time.
        command: Another child, in tests; it gets the output file as its last word.
    """
    if command is None and importlib.util.find_spec("torch") is None:
        return Probe(ended="no torch")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "steps.jsonl"
        output.touch()
        words = [*command, str(output)] if command else child_command(output)
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            steps, at = _read_steps(output)
            return Probe(ended="timed out", steps=steps, at=at or "import", how=f"{limit_s:g} s")
        steps, at = _read_steps(output)
    if done.returncode == 0 and not at:
        return Probe(ended="done", steps=steps)
    how = _death(done.returncode, done.stderr)
    return Probe(ended="crashed", steps=steps, at=at or "import", how=how)
