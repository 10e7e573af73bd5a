"""`CHECKS`: the checks in order, causes before consequences; and the functions that run them."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from strixft.doctor import devices, environment, kernel, memory, npu, packages, system
from strixft.doctor.finding import STATUSES, Check, Diagnosis, Finding, Fix
from strixft.doctor.view import HostView, run_probe
from strixft.recipe.load import load_recipe

CHECKS = (
    Check("platform", kernel.check_platform),
    Check("distribution", kernel.check_distribution),
    Check("kernel", kernel.check_kernel, strix_halo=True, outside=("wsl",)),
    Check("firmware", kernel.check_firmware, strix_halo=True, outside=("container", "wsl")),
    Check("gpu", devices.check_gpu),
    Check("driver", devices.check_driver, outside=("wsl",)),
    Check("access", devices.check_access, strix_halo=True),
    Check("several-gpus", devices.check_several_gpus, strix_halo=True),
    Check("environment", environment.check_environment),
    Check("torch-build", packages.check_torch_build),
    Check("rocm", packages.check_rocm, strix_halo=True),
    Check("bitsandbytes", packages.check_bitsandbytes),
    Check("carve-out", memory.check_carve_out, strix_halo=True),
    Check("memory-parameters", memory.check_memory_parameters, strix_halo=True),
    Check("gtt", memory.check_gtt, strix_halo=True),
    Check("gpu-memory-use", memory.check_holders, strix_halo=True),
    Check("swap", system.check_swap, strix_halo=True, outside=("container",)),
    Check("reclaim", system.check_reclaim, strix_halo=True),
    Check("out-of-memory", system.check_oom, strix_halo=True, outside=("container",)),
    Check("sleep", system.check_sleep, outside=("container", "wsl")),
    Check("disk", system.check_disk),
    Check("iommu", npu.check_iommu, strix_halo=True, outside=("wsl",)),
    Check("npu", npu.check_npu, strix_halo=True, outside=("wsl",)),
    Check("board", devices.check_board, strix_halo=True),
    Check("power", devices.check_power, strix_halo=True),
    Check("jupyter", environment.check_jupyter),
    Check("torch", packages.check_torch, needs_torch=True),
    *(
        Check(row.check, partial(packages.check_torch_step, row), needs_torch=True)
        for row in packages.TORCH_STEPS
    ),
)


def _applies(check: Check, view: HostView) -> bool:
    if check.strix_halo and view.strix_halo is None:
        return False
    inside = {"container": view.is_container, "wsl": view.is_wsl}
    return not any(inside[place] for place in check.outside)


def _look(check: Check, view: HostView) -> Iterator[Finding]:
    try:
        found = check.look(view) if _applies(check, view) else None
        for finding in (found,) if isinstance(found, Finding) else found or ():
            yield replace(finding, check=check.name)
    except Exception as error:  # one check that meets the impossible must not hide the others
        yield Finding(
            "unknown",
            f"the check stopped: {type(error).__name__}: {error}",
            "this host has something that the check did not expect",
            "strixft.doctor.checks",
            Fix("send this output to the project", ("strixft doctor --json",)),
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


def _comment(text: str) -> str:
    lines = [part for line in text.splitlines() for part in _WRAPPER.wrap(line) or [""]]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _block(finding: Finding, fix: Fix) -> str:
    text = "\n" + _comment(f"[{finding.status}] {finding.check}: {finding.saw}")
    text += _comment(f"why: {finding.why}") + _comment(f"source: {finding.source}")
    text += _comment(f"fix: {fix.say}")
    for command in fix.commands:
        # a script cannot change the environment of the shell that starts it
        by_hand = command.startswith(("export ", "unset "))
        text += f"# in your own shell: {command}\n" if by_hand else f"{command}\n"
    return text


def fix_script(diagnosis: Diagnosis) -> str:
    """Return the fixes as a shell script, worst first, each with its reason."""
    fixes = [(finding, finding.fix) for finding in diagnosis.to_fix if finding.fix]
    body = "".join(_block(finding, fix) for finding, fix in fixes)
    restarts = dict.fromkeys(fix.restart for _, fix in fixes if fix.restart)
    ends = "".join(f"echo {shlex.quote(f'then: {restart}')}\n" for restart in restarts)
    return HEAD + (body or "\n# nothing to fix\n") + ("\n" + ends if ends else "")
