"""`CHECKS`: the checks in order, causes before consequences; and the functions that run them."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from strixft.doctor import devices, memory, packages, system
from strixft.doctor.finding import STATUSES, Check, Diagnosis, Finding, Fix
from strixft.doctor.host import HostView, run_probe
from strixft.recipe.load import load_recipe

CHECKS: tuple[Check, ...] = (
    *(system.platform, system.distribution, system.kernel, system.firmware),
    *(devices.gpu, devices.driver, devices.access, devices.several_gpus, devices.kernels),
    *(packages.variables, packages.build, packages.rocm, packages.bitsandbytes),
    *(memory.carve_out, memory.parameters, memory.gtt, memory.use),
    *(system.swap, system.reclaim, system.out_of_memory, system.sleep, system.disk),
    *(devices.iommu, devices.npu, devices.board, devices.power),
    *(packages.jupyter, packages.torch, *packages.TORCH_STEPS),
)


def _look(check: Check, view: HostView) -> Iterator[Finding]:
    try:
        inside = {"container": view.is_container, "wsl": view.is_wsl}
        is_elsewhere = check.strix_halo and view.strix_halo is None
        seen = None if is_elsewhere or any(map(inside.get, check.outside)) else check.look(view)
        for found in (seen,) if isinstance(seen, Finding) else seen or ():
            why, source = found.why or check.why, found.source or check.source
            yield replace(found, check=check.name, why=why, source=source)
    except Exception as error:  # one check that meets the impossible must not hide the others
        yield Finding(
            "unknown",
            f"the check stopped: {type(error).__name__}: {error}",
            Fix("send this output to the project", ("strixft doctor --json",)),
            "this host has something that the check did not expect",
            "strixft.doctor.checks",
            check.name,
        )


def examine(view: HostView, checks: Sequence[Check] = CHECKS) -> Diagnosis:
    """Run checks on a host, live or recorded; within a status the findings keep their order."""
    findings = [finding for check in checks for finding in _look(check, view)]
    return Diagnosis(tuple(sorted(findings, key=lambda found: STATUSES.index(found.status))))


def check_host(recipe: str | Path | None = None, *, torch: bool = True) -> Diagnosis:
    """Check this machine.

    Args:
        recipe: Also check what this recipe needs: disk space, reserve, method.
        torch: Also try torch, in a child process: seconds.

    Raises:
        RecipeError: The recipe has faults.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    view = HostView(probe=cache(run_probe), recipe=loaded)
    return examine(view, [check for check in CHECKS if torch or not check.needs_torch])


HEAD = """\
#!/bin/sh
# Fixes that strixft doctor proposes for this machine. Nothing has been changed yet.
# Read every block; delete what you do not want; then run it: sh fixes.sh
set -eu
"""

_WRAPPER = textwrap.TextWrapper(96, break_long_words=False, break_on_hyphens=False)


def fix_script(diagnosis: Diagnosis) -> str:
    """Return the fixes as a shell script, worst first, each with its reason."""
    body, restarts = "", dict[str, None]()
    for found in diagnosis.to_fix:
        if (fix := found.fix) is None:
            continue
        saw = f"[{found.status}] {found.check}: {found.saw}"
        text = f"{saw}\nwhy: {found.why}\nsource: {found.source}\nfix: {fix.say}"
        lines = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
        body += "\n" + "".join(f"# {line}".rstrip() + "\n" for line in lines)
        for command in fix.commands:
            # a script cannot change the environment of the shell that starts it
            by_hand = command.startswith(("export ", "unset "))
            body += f"# in your own shell: {command}\n" if by_hand else f"{command}\n"
        restarts |= {fix.restart: None} if fix.restart else {}
    ends = "".join(f"echo {shlex.quote(f'then: {restart}')}\n" for restart in restarts)
    return HEAD + (body or "\n# nothing to fix\n") + ("\n" + ends if ends else "")
