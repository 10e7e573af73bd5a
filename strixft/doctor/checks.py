"""`CHECKS`: the checks in their order, causes before consequences; and running them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from strixft.doctor import (
    board,
    devices,
    disk,
    environment,
    jupyter,
    kernel,
    memory,
    npu,
    packages,
    processes,
    system,
    torch_checks,
)
from strixft.doctor.finding import Check, Diagnosis, Finding, Fix, worst_first
from strixft.doctor.view import HostView

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
    Check("gpu-memory-use", processes.check_holders),
    Check("swap", system.check_swap),
    Check("reclaim", system.check_reclaim),
    Check("out-of-memory", system.check_oom),
    Check("sleep", system.check_sleep),
    Check("disk", disk.check_disk),
    Check("iommu", npu.check_iommu),
    Check("npu", npu.check_npu),
    Check("board", board.check_board),
    Check("power", board.check_power),
    Check("jupyter", jupyter.check_jupyter),
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
            source="strixft.doctor",
        )


def examine(view: HostView, checks: Sequence[Check] = CHECKS) -> Diagnosis:
    """Run checks on a host, live or recorded."""
    return Diagnosis(worst_first(finding for check in checks for finding in _look(check, view)))
