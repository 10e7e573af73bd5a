"""Asks torch, in a child process with a time limit: a crash or a hang there is a finding here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from strixft.child import Probe, run_steps

STEPS = ("import", "nf4", "attention", "head", "step", "flex")
"""What the child does, in its order; what compiles longest comes last."""
LIMIT_S = 120.0
"""A first run on a new GPU compiles kernels; seconds are the rule."""
CHILD = (sys.executable, "-m", "strixft.doctor.probe_child")


def run_probe(limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> Probe:
    """Run the child and collect what it found out.

    Args:
        limit_s: It is ended after this time.
        command: Another child, in tests; it gets the output file as its last word.
    """
    if command is None and importlib.util.find_spec("torch") is None:
        return Probe(ended="no torch")
    return run_steps(command or CHILD, limit_s)
