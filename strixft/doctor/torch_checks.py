"""Findings from what the child process saw torch do."""

from __future__ import annotations

from collections.abc import Iterator

from strixft.catalog.methods import BITSANDBYTES
from strixft.doctor.finding import Finding, Fix
from strixft.doctor.packages import BNB_SOURCE, ROCM_TORCH, needed_build, rocm_torch, torch_build
from strixft.doctor.view import HostView
from strixft.probe.checks import KNOWN_ISSUES
from strixft.support.child import Probe
from strixft.support.units import format_gib

RUN = "run here, in a child process"

SHOW = ("python -m strixft.doctor.probe_child /dev/stderr",)
"""Shows the steps and every line that torch writes."""

AGAIN = Fix("see the whole error", SHOW)


def _probe(view: HostView) -> Probe | None:
    probe = view.probe()
    return None if probe is None or probe.ended == "no torch" else probe


def check_torch(view: HostView) -> Iterator[Finding]:
    """Import, and the first kernel on the device."""
    probe = _probe(view)
    if probe is None:
        return
    figures = probe.steps.get("import", {})
    if (problem := probe.problem("import")) is not None:
        yield _dead_import(view, probe, problem)
        return
    saw = f"torch {figures.get('version')} on {figures.get('device')}"
    if figures.get("device") == "cpu" and needed_build(view) != "cpu":
        yield _no_device(view, saw)
    elif (wrong := _wrong_arch(figures.get("arch"), figures.get("arch_list"))) is not None:
        yield Finding(
            status="fail",
            saw=f"{saw}, {wrong}",
            why="no kernels for this GPU inside: 'invalid device function' at the first one",
            fix=rocm_torch(view),
            source=f"{RUN}; h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md",
        )
    else:
        total = figures.get("total_bytes")
        memory = f", {format_gib(total)} by its own count" if total else ""
        yield Finding(status="ok", saw=saw + memory, why="imports and answers", source=RUN)


def _no_device(view: HostView, saw: str) -> Finding:
    rocm = needed_build(view) == "rocm"
    if torch_build(view) != needed_build(view):
        fix = rocm_torch(view) if rocm else Fix("install a CUDA build", ("make setup TORCH=cuda",))
    else:
        command = "rocminfo | head -40" if rocm else "nvidia-smi"
        fix = Fix("mend what else failed on this page, then ask the driver", (command,))
    return Finding(
        status="fail",
        saw=f"{saw}: torch.cuda.is_available() is False",
        why="the GPU is there and torch does not use it: the build, the driver or access to it",
        fix=fix,
        source=RUN,
    )


def _wrong_arch(arch: object, arch_list: object) -> str | None:
    if not arch or not isinstance(arch_list, list) or not str(arch).startswith("gfx"):
        return None
    if any(str(name).startswith(str(arch)) for name in arch_list):
        return None
    return f"{arch} is not in its list {' '.join(map(str, arch_list))}"


def _dead_import(view: HostView, probe: Probe, problem: str) -> Finding:
    hang = probe.ended == "timed out"
    amd = view.strix_halo is not None
    fix = rocm_torch(view) if amd and not hang else AGAIN
    return Finding(
        status="fail",
        saw=f"torch did not start: {problem}",
        why="a hang in the first kernel is a kernel below the floor or bad firmware"
        if hang
        else f"a broken or foreign build; {ROCM_TORCH} is the one for gfx1151"
        if amd
        else "nothing can be trained",
        fix=fix,
        source=f"{RUN}; ROCm/TheRock#5763",
    )


def _step(
    view: HostView, step: str, saw: str, why: str, fix: Fix, source: str
) -> Iterator[Finding]:
    """The finding of one step: its problem, why it did not run, or what it saw."""
    probe = _probe(view)
    if probe is None or probe.problem("import") is not None:
        return
    problem = probe.problem(step)
    figures = probe.steps.get(step)
    if problem is not None:
        yield Finding(status="fail", saw=problem, why=why, fix=fix, source=source)
    elif figures is None:
        saw = f"not reached: {probe.ended} at {probe.at}"
        first = Fix(f"first make '{probe.at}' work", SHOW)
        yield Finding(status="unknown", saw=saw, why=why, fix=first, source=source)
    elif "skipped" in figures:
        wanting = "not installed" in str(figures["skipped"])
        yield Finding(
            status="unknown" if wanting else "ok",
            saw=str(figures["skipped"]),
            why=why,
            fix=Fix("install the environment", ("make setup",)) if wanting else None,
            source=source,
        )
    else:
        yield Finding(status="ok", saw=saw.format(**figures), why=why, source=source)


def check_nf4(view: HostView) -> Iterator[Finding]:
    """4-bit weights come back as they went in, but for the rounding."""
    yield from _step(
        view,
        "nf4",
        "bitsandbytes {version}: error {relative_error} after a round trip",
        f"qlora trains on these weights; {KNOWN_ISSUES['nf4'].what}",
        Fix("install a version with the fix", (f'pip install "{BITSANDBYTES}"',)),
        f"{RUN}; {BNB_SOURCE}",
    )


def check_attention(view: HostView) -> Iterator[Finding]:
    """Fused attention against attention written out."""
    yield from _step(
        view,
        "attention",
        "SDPA is right, forward and backward, at head sizes 64 to 256 ({dtype})",
        "a wrong attention kernel trains a broken model or gives NaN",
        Fix(
            "turn the experimental kernels off",
            ("export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=0",),
            "start Python again",
        ),
        f"{RUN}; ROCm/aotriton#179",
    )


def check_flex(view: HostView) -> Iterator[Finding]:
    """Flex attention, compiled by Triton."""
    for finding in _step(
        view,
        "flex",
        "flex attention compiles and is right (error {error:.2g})",
        "packed rows use it where it works; without it they use SDPA",
        Fix(
            "let Triton find its linker",
            ('export TRITON_HIP_LLD_PATH="$(find "$VIRTUAL_ENV" -name ld.lld | head -1)"',),
            "start Python again",
        ),
        f"{RUN}; kyuz0/amd-strix-halo-llm-finetuning: scripts/01-rocm-env-for-triton.sh",
    ):
        yield _softer(finding)


def check_head(view: HostView) -> Iterator[Finding]:
    """TRL's fused head."""
    for finding in _step(
        view,
        "head",
        "TRL's fused head is right, forward and backward",
        f"{KNOWN_ISSUES['fused-head'].what}; training uses {KNOWN_ISSUES['fused-head'].instead}",
        AGAIN,
        f"{RUN}; {KNOWN_ISSUES['fused-head'].source}",
    ):
        yield _softer(finding)


def _softer(finding: Finding) -> Finding:
    """A part that has a replacement is a warning when it fails."""
    if finding.status != "fail":
        return finding
    return Finding(
        status="warn", saw=finding.saw, why=finding.why, fix=finding.fix, source=finding.source
    )


def check_step(view: HostView) -> Iterator[Finding]:
    """One real LoRA step of the product on a tiny model."""
    yield from _step(
        view,
        "step",
        "three LoRA updates of a tiny model: loss {losses[0]:.3f} → {losses[2]:.3f}",
        "everything that training uses, at once",
        AGAIN,
        RUN,
    )
