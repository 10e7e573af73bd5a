"""Checks a host: what is wrong with this machine, why it matters, and what to type.

view        the host: files, commands, environment; live or recorded
finding     what a check finds
checks      `CHECKS`, the table of them, and running them
distro      fixes for this distribution and boot loader
probe       torch in a child process
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from strixft.child import Probe
from strixft.doctor.checks import CHECKS, examine
from strixft.doctor.finding import Check, Diagnosis, Finding, Fix
from strixft.doctor.probe import run_probe
from strixft.doctor.script import fix_script
from strixft.doctor.view import HostView
from strixft.recipe import load_recipe

__all__ = [
    "CHECKS",
    "Check",
    "Diagnosis",
    "Finding",
    "Fix",
    "HostView",
    "Probe",
    "check_host",
    "examine",
    "fix_script",
]


def check_host(recipe: str | Path | None = None, *, torch: bool = True) -> Diagnosis:
    """Check this machine.

    Args:
        recipe: Also what this recipe needs: disk space, reserve, method.
        torch: Also what torch does here, in a child process: seconds.

    Raises:
        RecipeError: The recipe has faults.
    """
    view = HostView(
        probe=cache(run_probe), recipe=load_recipe(recipe) if recipe is not None else None
    )
    return examine(view, [check for check in CHECKS if torch or not check.needs_torch])
