"""Checks of torch, ROCm and bitsandbytes: as installed, and as they run in a child process.

The installed packages are read from their metadata and files; nothing is imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.methods import BITSANDBYTES
from strixft.doctor.devices import NVIDIA_VENDOR
from strixft.doctor.finding import Finding, Fix, Status
from strixft.doctor.kernel import AMD_DOC, FINETUNE_GUIDE
from strixft.doctor.view import HostView
from strixft.support.child import Probe
from strixft.support.units import format_gib

ROCM_INDEX = "https://repo.amd.com/rocm/whl/gfx1151/"

ROCM_TORCH = "torch==2.11.0+rocm7.13.0"
"""The exact local version: without it pip takes the newer CUDA build."""

WHEELS = "ROCm/TheRock: RELEASES.md; amd/playbooks (vendor)"

BNB_SOURCE = "bitsandbytes-foundation/bitsandbytes PR #1885; wheels unpacked (tested)"

SETUP = Fix("install the environment", ("make setup",))

INSTALL_ROCM_TORCH = Fix(
    "install AMD's build for this GPU",
    (f'pip install --force-reinstall --index-url {ROCM_INDEX} "{ROCM_TORCH}"',),
    "restart Python, or the notebook's kernel",
)

INSTALL_CUDA_TORCH = Fix("install a CUDA build", ("make setup TORCH=cuda",))

INSTALL_BITSANDBYTES = Fix("install a version with the fix", (f'pip install "{BITSANDBYTES}"',))

Version = tuple[int, ...]

HIP_OF_ROCM = {10: (7, 16)}
"""HIP version by ROCm major, where the two differ (shootthesound/Fizgig PR #103)."""

GOOD_ROCM = (((7, 2, 1), (7, 3)), ((7, 11), (8,)))
"""Half-open ranges that work with the kernels of the floor; 7.9 and 7.10 do not."""


def _shown(version: Version) -> str:
    return ".".join(map(str, version))


def _built_with(view: HostView, name: str) -> str | None:
    """`hip`, `rocm` or `cuda` in torch's `version.py`: "" for None, None if it is not there."""
    text = view.read(view.package_folder("torch") / "version.py") or ""
    found = re.search(rf"^{name}\b[^=\n]*=\s*(?:None|['\"](.+)['\"])", text, re.MULTILINE)
    return (found[1] or "") if found else None


def torch_build(view: HostView) -> str | None:
    """Return `rocm`, `cpu` or `cuda`; None where torch is not installed.

    The local part of the version names the wheel index. PyPI's CUDA build has none, nor do builds
    of distributions or from source (`2.9.0a0+git7bcbafe`, unslothai/unsloth PR #4053), so
    `version.py` counts too.
    """
    version = view.package_version("torch")
    if version is None:
        return None
    local = version.partition("+")[2]
    if "rocm" in local or _built_with(view, "hip"):
        return "rocm"
    return "cpu" if "cpu" in local or _built_with(view, "cuda") == "" else "cuda"


def needed_build(view: HostView) -> str:
    """Return the build for this machine: `rocm`, `cuda` or `cpu`."""
    if view.strix_halo is not None:
        return "rocm"
    return "cuda" if NVIDIA_VENDOR in view.vendors else "cpu"


def rocm_version(view: HostView) -> Version | None:
    """Return the ROCm version of torch, from its local version or its `version.py`.

    `2.11.0+rocm7.13.0` is (7, 13, 0); `2.9.1+rocm7.2.1.lw.git7e1940d4` is (7, 2, 1). A torch
    without `rocm` in `version.py` is older than ROCm 10, so HIP's 7.2.53211 is some ROCm 7.2.
    """
    local = (view.package_version("torch") or "").partition("+")[2]
    named = f"{local} rocm{_built_with(view, 'rocm')}"
    found = re.search(r"rocm(?:sdk)?(\d+)\.(\d+)(?:\.(\d+))?", named)
    found = found or re.match(r"(\d+)\.(\d+)", _built_with(view, "hip") or "")
    return tuple(int(part) for part in found.groups() if part) if found else None


def hip_version(view: HostView) -> Version | None:
    """Return torch's HIP version, by which bitsandbytes chooses its library."""
    found = re.match(r"(\d+)\.(\d+)", _built_with(view, "hip") or "")
    if found:
        return int(found[1]), int(found[2])
    rocm = rocm_version(view)
    return HIP_OF_ROCM.get(rocm[0], rocm[:2]) if rocm else None


def check_torch_build(view: HostView) -> Finding:
    """Compare the build of torch with the machine."""
    version, build, needed = view.package_version("torch"), torch_build(view), needed_build(view)
    if build is None:
        why = "torch, ROCm and bitsandbytes could not be tried"
        return Finding("unknown", f"torch is not installed in {view.prefix}", why, WHEELS, SETUP)
    saw = f"torch {version}, a build for {build.upper()}"
    if needed == build:
        return Finding("ok", saw, "the build for this machine", WHEELS)
    if needed == "rocm":
        why = "it cannot see an AMD GPU: it came from the wrong index"
        return Finding("fail", saw, why, WHEELS, INSTALL_ROCM_TORCH)
    if needed == "cuda":
        source = "https://pytorch.org/get-started/locally/"
        return Finding("fail", saw, "it cannot see an NVIDIA GPU", source, INSTALL_CUDA_TORCH)
    if AMD_VENDOR in view.vendors and build != "rocm":
        why = "if ROCm supports this AMD GPU, the ROCm build of torch uses it"
        fix = Fix("choose the ROCm build", ("https://pytorch.org/get-started/locally/",))
        return Finding("ok", saw, why, WHEELS, fix)
    return Finding("ok", saw, "it runs on the CPU here", WHEELS)


def check_rocm(view: HostView) -> Finding | None:
    """Compare the ROCm version of torch with those that work on the floor's kernels."""
    version = rocm_version(view)
    if torch_build(view) != "rocm":
        return None
    if version is None:
        saw = f"torch {view.package_version('torch')} does not state a ROCm version"
        why = "7.2.1–7.2.4 and 7.11–7.14 work with the kernels of the floor"
        fix = Fix("ask torch", ('python -c "import torch; print(torch.version.hip)"',))
        return Finding("unknown", saw, why, AMD_DOC, fix)
    saw = f"ROCm {_shown(version)}"
    exact = version if len(version) > 2 else (*version, 1)  # "rocm7.2": some 7.2
    if any(low <= exact < high for low, high in GOOD_ROCM):
        return Finding("ok", saw, "works with this kernel", AMD_DOC)
    if version >= (8,):
        why = "no report of training with it on gfx1151 was found"
        return Finding("warn", saw, why, AMD_DOC, INSTALL_ROCM_TORCH)
    why = "6.4, 7.1, 7.9 and 7.10 do not work with the kernels that this GPU needs"
    return Finding("fail", saw, why, AMD_DOC, INSTALL_ROCM_TORCH)


def library_versions(view: HostView) -> list[Version]:
    """Return the ROCm versions that the installed bitsandbytes has a library for.

    `libbitsandbytes_rocm72.so` is (7, 2), `…_rocm714.so` is (7, 14).
    """
    files = view.package_folder("bitsandbytes").glob("libbitsandbytes_rocm*.so")
    digits = [path.stem.rpartition("rocm")[2].replace(".", "") for path in files]
    return sorted((int(d[0]), int(d[1:])) for d in digits if d.isdigit() and len(d) > 1)


def check_bitsandbytes(view: HostView) -> Finding:
    """Check the version of bitsandbytes and its library for the ROCm major of torch."""
    version = view.package_version("bitsandbytes")
    if version is None:
        why = "4-bit training (qlora) needs it; lora and full do not"
        saw = "bitsandbytes is not installed"
        return Finding("unknown", saw, why, BNB_SOURCE, INSTALL_BITSANDBYTES)
    saw = f"bitsandbytes {version}"
    if torch_build(view) != "rocm":
        return Finding("ok", saw, "4-bit training", BNB_SOURCE)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 50):
        why = (
            "its wave size is wrong for this GPU: NF4 with block size 64, the default, gives"
            " garbage, and block size 32 crashes"
        )
        saw = f"{saw} with a ROCm build of torch"
        return Finding("fail", saw, why, BNB_SOURCE, INSTALL_BITSANDBYTES)
    rocm, hip, libraries = rocm_version(view), hip_version(view), library_versions(view)
    if hip is None or not libraries:
        why = "without a library for torch's ROCm major, nothing works in 4 bits"
        fix = Fix("print what it loads", ("python -m bitsandbytes",))
        saw = f"{saw}; its ROCm libraries could not be listed"
        return Finding("unknown", saw, why, BNB_SOURCE, fix)
    usable = [row for row in libraries if row[0] == hip[0] and row <= hip]
    if not usable:
        saw = f"{saw} has no library for HIP {_shown(hip)}"
        why = "qlora and 8-bit optimizers raise 'not found': wheels up to 0.50.2 stop at HIP 7"
        source = f"{BNB_SOURCE}; patientx-cfz/comfyui-rocm#113"
        return Finding("fail", saw, why, source, INSTALL_ROCM_TORCH)
    used = usable[-1]
    saw = f"{saw}: its library for ROCm {_shown(used)} serves HIP {_shown(hip)}"
    if rocm is None or rocm[0] == hip[0] or used == hip:
        why = "it takes the nearest lower library of the same major"
        return Finding("ok", saw, why, BNB_SOURCE)
    return Finding(
        "warn",
        f"{saw}, which is ROCm {_shown(rocm)}'s",
        "unproved on this GPU: the library loads with a warning, and no report of 4-bit training"
        " with it was found; the NF4 round trip decides",
        "bitsandbytes 0.50.2: cextension.py, cuda_specs.py; shootthesound/Fizgig PR #103",
        Fix("read the result of check nf4: if it is ok, 4-bit weights are right here"),
    )


RUN_HERE = "run here, in a child process"

SHOW_STEPS = ("python -m strixft.doctor.probe_child /dev/stderr",)
"""Shows the steps and every line that torch writes."""

SHOW_ERROR = Fix("read the whole error", SHOW_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchStep:
    """A step of the child process and its finding."""

    check: str
    step: str
    saw: str
    """Text where it works, formatted with the step's figures."""
    why: str
    fix: Fix = SHOW_ERROR
    source: str = ""
    failed: Status = "fail"
    """`warn` where training has a replacement."""


TORCH_STEPS = (
    TorchStep(
        check="nf4",
        step="nf4",
        saw="bitsandbytes {version}: error {relative_error} after a round trip",
        why="qlora trains on these weights; a wrong wave size gave garbage for NF4 in blocks of 64,"
        " without an error",
        fix=INSTALL_BITSANDBYTES,
        source=BNB_SOURCE,
    ),
    TorchStep(
        check="attention",
        step="attention",
        saw="SDPA is right, forward and backward, at head sizes 64 to 256 ({dtype})",
        why="a wrong attention kernel trains a broken model or gives NaN",
        fix=Fix(
            "turn the experimental kernels off",
            ("export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=0",),
            "restart Python",
        ),
        source="ROCm/aotriton#179",
    ),
    TorchStep(
        check="flex-attention",
        step="flex",
        saw="flex attention compiles and is right (error {error:.2g})",
        why="packed rows use it where it works; without it they use SDPA",
        fix=Fix(
            "let Triton find its linker",
            ('export TRITON_HIP_LLD_PATH="$(find "$VIRTUAL_ENV" -name ld.lld | head -1)"',),
            "restart Python",
        ),
        source="kyuz0/amd-strix-halo-llm-finetuning: scripts/01-rocm-env-for-triton.sh",
        failed="warn",
    ),
    TorchStep(
        check="fused-head",
        step="head",
        saw="the chunked head is right, forward and backward (error {relative_error:.2g})",
        why="training takes the loss and its gradient from it, without the logits of all tokens",
        source="strixft.step.loss",
    ),
    TorchStep(
        check="training-step",
        step="step",
        saw="three LoRA updates of a tiny model: loss {losses[0]:.3f} → {losses[2]:.3f}",
        why="it uses everything that training uses, at once",
    ),
)


def _probe(view: HostView) -> Probe | None:
    probe = view.probe()
    return None if probe is None or probe.ended == "no torch" else probe


def check_torch(view: HostView) -> Finding | None:
    """Check that torch imports and that its first kernel on the device ends."""
    probe = _probe(view)
    if probe is None:
        return None
    if (problem := probe.problem("import")) is not None:
        return _explain_dead_torch(view, hang=probe.ended == "timed out", problem=problem)
    figures, needed = probe.steps.get("import", {}), needed_build(view)
    saw = f"torch {figures.get('version')} on {figures.get('device')}"
    if figures.get("device") == "cpu" and needed != "cpu":
        saw = f"{saw}: torch.cuda.is_available() is False"
        why = "torch does not use the GPU of this machine: the build, the driver or access to it"
        command = "rocminfo | head -40" if needed == "rocm" else "nvidia-smi"
        fix = Fix("first fix the other failures listed here, then ask the driver", (command,))
        if torch_build(view) != needed:
            fix = INSTALL_ROCM_TORCH if needed == "rocm" else INSTALL_CUDA_TORCH
        return Finding("fail", saw, why, RUN_HERE, fix)
    arch, known = str(figures.get("arch") or ""), figures.get("arch_list")
    in_list = isinstance(known, list) and any(str(name).startswith(arch) for name in known)
    if arch.startswith("gfx") and isinstance(known, list) and not in_list:
        saw = f"{saw}, {arch} is not in its list {' '.join(map(str, known))}"
        why = "it has no kernels for this GPU: 'invalid device function' at the first one"
        return Finding("fail", saw, why, f"{RUN_HERE}; {FINETUNE_GUIDE}", INSTALL_ROCM_TORCH)
    total = figures.get("total_bytes")
    memory = f", {format_gib(total)} by its own count" if total else ""
    return Finding("ok", saw + memory, "it imports and computes", RUN_HERE)


def _explain_dead_torch(view: HostView, *, hang: bool, problem: str) -> Finding:
    fix, why = SHOW_ERROR, "nothing can be trained"
    if hang:
        why = "a hang in the first kernel means a kernel below the floor or bad firmware"
    elif view.strix_halo is not None:
        fix = INSTALL_ROCM_TORCH
        why = f"a broken or foreign build; {ROCM_TORCH} is the one for gfx1151"
    source = f"{RUN_HERE}; ROCm/TheRock#5763"
    return Finding("fail", f"torch did not start: {problem}", why, source, fix)


def check_torch_step(row: TorchStep, view: HostView) -> Finding | None:
    """Report one step: its problem, why it did not run, or what it measured."""
    probe = _probe(view)
    if probe is None or probe.problem("import") is not None:
        return None
    source = f"{RUN_HERE}; {row.source}" if row.source else RUN_HERE
    problem, figures = probe.problem(row.step), probe.steps.get(row.step)
    if problem is not None:
        return Finding(row.failed, problem, row.why, source, row.fix)
    if figures is None:
        saw = f"not reached: {probe.ended} at {probe.at}"
        first = Fix(f"first make '{probe.at}' work", SHOW_STEPS)
        return Finding("unknown", saw, row.why, source, first)
    if "skipped" in figures:
        saw = str(figures["skipped"])
        if "not installed" in saw:
            return Finding("unknown", saw, row.why, source, SETUP)
        return Finding("ok", saw, row.why, source)
    return Finding("ok", row.saw.format(**figures), row.why, source)
