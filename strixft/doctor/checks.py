"""`CHECKS`: the checks in their order, causes before consequences; and running them."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from strixft.doctor import (
    board,
    devices,
    environment,
    kernel,
    memory,
    npu,
    packages,
    system,
    torch_checks,
)
from strixft.doctor.finding import Check, Diagnosis, Finding, Fix, worst_first
from strixft.doctor.view import HostView, run_probe
from strixft.recipe.load import load_recipe
from strixft.support.child import Probe

CHECKS = (
    Check("platform", kernel.check_platform),
    Check("distribution", kernel.check_distribution),
    Check("kernel", kernel.check_kernel),
    Check("firmware", kernel.check_firmware),
    Check("gpu", devices.check_gpu),
    Check("driver", devices.check_driver),
    Check("access", devices.check_access),
    Check("several-gpus", devices.check_several_gpus),
    Check("environment", environment.check_environment),
    Check("torch-build", packages.check_torch_build),
    Check("rocm", packages.check_rocm),
    Check("bitsandbytes", packages.check_bitsandbytes),
    Check("carve-out", memory.check_carve_out),
    Check("memory-parameters", memory.check_memory_parameters),
    Check("gtt", memory.check_gtt),
    Check("gpu-memory-use", devices.check_holders),
    Check("swap", system.check_swap),
    Check("reclaim", system.check_reclaim),
    Check("out-of-memory", system.check_oom),
    Check("sleep", system.check_sleep),
    Check("disk", system.check_disk),
    Check("iommu", npu.check_iommu),
    Check("npu", npu.check_npu),
    Check("board", board.check_board),
    Check("power", board.check_power),
    Check("jupyter", environment.check_jupyter),
    Check("torch", torch_checks.check_torch, needs_torch=True),
    Check("nf4", torch_checks.check_nf4, needs_torch=True),
    Check("attention", torch_checks.check_attention, needs_torch=True),
    Check("flex-attention", torch_checks.check_flex, needs_torch=True),
    Check("fused-head", torch_checks.check_head, needs_torch=True),
    Check("training-step", torch_checks.check_step, needs_torch=True),
)


def _look(check: Check, view: HostView) -> Iterator[Finding]:
    try:
        for finding in check.look(view):
            yield replace(finding, check=check.name)
    except Exception as error:  # one check that meets the impossible must not hide the others
        yield Finding(
            check=check.name,
            status="unknown",
            saw=f"the check stopped: {type(error).__name__}: {error}",
            why="this host has something that the check did not expect",
            fix=Fix("send what this prints to the project", ("strixft doctor --json",)),
            source="strixft.doctor.checks",
        )


def examine(view: HostView, checks: Sequence[Check] = CHECKS) -> Diagnosis:
    """Run checks on a host, live or recorded."""
    return Diagnosis(worst_first(finding for check in checks for finding in _look(check, view)))


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


def _is_shell_state(command: str) -> bool:
    """`export` and `unset` in a script change nothing for the shell that starts it."""
    return command.startswith(("export ", "unset "))


def _block(finding: Finding) -> str:
    assert finding.fix is not None
    text = "\n" + _comment(f"[{finding.status}] {finding.check}: {finding.saw}")
    text += _comment(f"why: {finding.why}") + _comment(f"source: {finding.source}")
    text += _comment(f"fix: {finding.fix.say}")
    for command in finding.fix.commands:
        by_hand = _is_shell_state(command)
        text += f"# in your own shell: {command}\n" if by_hand else f"{command}\n"
    return text


def fix_script(diagnosis: Diagnosis) -> str:
    """The fixes of every finding that is not ok, worst first, each with its reason."""
    findings = [finding for finding in diagnosis.to_fix if finding.fix]
    body = "".join(_block(finding) for finding in findings)
    restarts = dict.fromkeys(f.fix.restart for f in findings if f.fix and f.fix.restart)
    ends = "".join(f"echo {shlex.quote(f'then: {restart}')}\n" for restart in restarts)
    return HEAD + (body or "\n# nothing to fix\n") + ("\n" + ends if ends else "")


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
