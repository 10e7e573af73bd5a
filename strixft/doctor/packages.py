"""Checks of the Python environment: variables, torch, ROCm, bitsandbytes and Jupyter.

The installed packages are read from their metadata and files; nothing is imported here. What torch
does is tried in a child process.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.methods import BITSANDBYTES, METHODS
from strixft.doctor.devices import GPU_ISOLATION
from strixft.doctor.finding import Check, Finding, Fix, Status, check
from strixft.doctor.host import AMD_DOC, FINETUNE_GUIDE, NVIDIA_VENDOR, HostView
from strixft.support.child import Probe
from strixft.support.environment import OVERRIDE, OVERRIDE_WHY
from strixft.support.units import format_gib

ROCM_INDEX = "https://repo.amd.com/rocm/whl/gfx1151/"

ROCM_TORCH = "torch==2.11.0+rocm7.13.0"
"""The exact local version: without it pip takes the newer CUDA build."""

WHEELS = "ROCm/TheRock: RELEASES.md; amd/playbooks (vendor)"

BNB_SOURCE = "bitsandbytes-foundation/bitsandbytes PR #1885; wheels unpacked (tested)"

RESTART = "restart Python, or the notebook's kernel"

SETUP = Fix("install the environment", ("make setup",))

INSTALL_ROCM_TORCH = Fix(
    "install AMD's build for this GPU",
    (f'pip install --force-reinstall --index-url {ROCM_INDEX} "{ROCM_TORCH}"',),
    RESTART,
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


def _hip_numbers(view: HostView) -> Version:
    found = re.match(r"(\d+)\.(\d+)", _built_with(view, "hip") or "")
    return (int(found[1]), int(found[2])) if found else ()


def rocm_version(view: HostView) -> Version:
    """Return the ROCm version of torch, from its local version or its `version.py`; or ().

    `2.11.0+rocm7.13.0` is (7, 13, 0); `2.9.1+rocm7.2.1.lw.git7e1940d4` is (7, 2, 1). A torch
    without `rocm` in `version.py` is older than ROCm 10, so HIP's 7.2.53211 is some ROCm 7.2.
    """
    local = (view.package_version("torch") or "").partition("+")[2]
    named = f"{local} rocm{_built_with(view, 'rocm')}"
    found = re.search(r"rocm(?:sdk)?(\d+)\.(\d+)(?:\.(\d+))?", named)
    return tuple(int(part) for part in found.groups() if part) if found else _hip_numbers(view)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """Environment variables with the same effect."""

    names: tuple[str, ...]
    is_wrong: Callable[[str | None, HostView], bool]
    """Gets the value, None if it is not set."""
    status: Status = "warn"
    why: str
    source: str
    value: str | None = None
    """The right value; None: not set at all."""


def _is_on(value: str | None, view: HostView) -> bool:
    return value not in (None, "", "0")


def _is_set_on_amd(value: str | None, view: HostView) -> bool:
    return value is not None and AMD_VENDOR in view.vendors


def _hides_gpu(value: str | None, view: HostView) -> bool:
    """An empty list, or a first number below zero, hides all GPUs."""
    hides = value is not None and (not value.strip() or value.strip().startswith("-"))
    return hides and needed_build(view) != "cpu"


def _lacks_aotriton(value: str | None, view: HostView) -> bool:
    return value != "1" and torch_build(view) == "rocm" and view.strix_halo is not None


def _slows_full_training(value: str | None, view: HostView) -> bool:
    recipe = view.recipe
    return recipe is not None and _is_on(value, view) and METHODS[recipe.method].adapter == "none"


VARIABLES = (
    Variable(
        names=(OVERRIDE,),
        is_wrong=_is_set_on_amd,
        status="fail",
        why=OVERRIDE_WHY,
        source=f"ROCm/ROCm#5824; {FINETUNE_GUIDE} (measured)",
    ),
    Variable(
        names=("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
        is_wrong=lambda value, view: "backend:malloc" in (value or ""),
        status="fail",
        why="backend:malloc crashes PyTorch",
        source=f"{FINETUNE_GUIDE}; pytorch/pytorch#187343",
        value="expandable_segments:True",
    ),
    Variable(
        names=("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        is_wrong=_hides_gpu,
        status="fail",
        why="it hides every GPU from torch",
        source=GPU_ISOLATION,
    ),
    Variable(
        names=("STRIXFT_DEVICE",),
        is_wrong=lambda value, view: value == "cpu" and view.strix_halo is not None,
        why="training stays on the CPU although there is a GPU",
        source="strixft.guard",
    ),
    Variable(
        names=("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",),
        is_wrong=_lacks_aotriton,
        why="attention is 10 to 30 times slower without it; it must be set before torch starts",
        source="lhl/strix-halo-testing: torch-therock/README.md; bkpaine1/amdsense (measured)",
        value="1",
    ),
    Variable(
        names=("ROCBLAS_USE_HIPBLASLT", "TORCH_BLAS_PREFER_HIPBLASLT"),
        is_wrong=_slows_full_training,
        why="this recipe trains every weight, and hipBLASLt computes large weight gradients two to"
        " four times slower than rocBLAS (16.4 against 39.9 TFLOPS at 4096³)",
        source="ROCm/TheRock#5314 (measured, confirmed by AMD)",
    ),
    Variable(
        names=("HSA_ENABLE_SDMA",),
        is_wrong=lambda value, view: value == "0",
        why="it turns the copy engines off; it is for diagnosis, not for work",
        source="issue threads of ROCm/ROCm (#6530, #5853)",
    ),
    Variable(
        names=("HSA_XNACK",),
        is_wrong=_is_set_on_amd,
        why="nothing here needs it; start without overrides",
        source="ianbarber/strix-halo-skills: SKILL.md",
    ),
    Variable(
        names=("HIP_LAUNCH_BLOCKING", "CUDA_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL"),
        is_wrong=_is_on,
        why="every kernel waits for the one before it; it is for diagnosis, not for work",
        source="https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html",
    ),
    Variable(
        names=("MKL_DEBUG_CPU_TYPE",),
        is_wrong=lambda value, view: value is not None,
        why="MKL has ignored it since 2020 update 1; strixft mkl does what it once did",
        source="https://danieldk.eu/Intel-MKL-on-AMD-Zen",
    ),
)


@check("environment", source=FINETUNE_GUIDE)
def variables(view: HostView) -> Iterator[Finding]:
    """Check the variables that help or hurt."""
    pairs = [(name, row) for row in VARIABLES for name in row.names]
    wrong = [(name, row) for name, row in pairs if row.is_wrong(view.environ.get(name), view)]
    for name, row in wrong:
        value = view.environ.get(name)
        files = "~/.profile ~/.bashrc ~/.zshrc /etc/environment /etc/profile.d"
        say = "unset it now and remove it where it is set"
        commands = (f"unset {name}", f"grep -rn {name} {files}")
        if row.value is not None:
            say, line = "set it now and for every later shell", f"export {name}={row.value}"
            commands = (line, f"echo '{line}' >> ~/.profile")
        saw = f"{name} is not set" if value is None else f"{name}={value}"
        yield Finding(row.status, saw, Fix(say, commands, RESTART), row.why, row.source)
    if not wrong:
        why = f"checked {', '.join(name for name, _ in pairs)}"
        yield Finding("ok", "no variable that hurts", why=why)


@check("torch-build", source=WHEELS)
def build(view: HostView) -> Finding:
    """Compare the build of torch with the machine."""
    found, needed = torch_build(view), needed_build(view)
    if found is None:
        why = "torch, ROCm and bitsandbytes could not be tried"
        return Finding("unknown", f"torch is not installed in {view.prefix}", SETUP, why)
    saw = f"torch {view.package_version('torch')}, a build for {found.upper()}"
    if needed == found:
        return Finding("ok", saw, why="the build for this machine")
    if needed == "rocm":
        why = "it cannot see an AMD GPU: it came from the wrong index"
        return Finding("fail", saw, INSTALL_ROCM_TORCH, why)
    if needed == "cuda":
        source = "https://pytorch.org/get-started/locally/"
        return Finding("fail", saw, INSTALL_CUDA_TORCH, "it cannot see an NVIDIA GPU", source)
    if AMD_VENDOR in view.vendors and found != "rocm":
        why = "if ROCm supports this AMD GPU, the ROCm build of torch uses it"
        fix = Fix("choose the ROCm build", ("https://pytorch.org/get-started/locally/",))
        return Finding("ok", saw, fix, why)
    return Finding("ok", saw, why="it runs on the CPU here")


@check("rocm", source=AMD_DOC, strix_halo=True)
def rocm(view: HostView) -> Finding | None:
    """Compare the ROCm version of torch with those that work on the floor's kernels."""
    if torch_build(view) != "rocm":
        return None
    version = rocm_version(view)
    if not version:
        saw = f"torch {view.package_version('torch')} does not state a ROCm version"
        fix = Fix("ask torch", ('python -c "import torch; print(torch.version.hip)"',))
        why = "7.2.1–7.2.4 and 7.11–7.14 work with the kernels of the floor"
        return Finding("unknown", saw, fix, why)
    saw = f"ROCm {_shown(version)}"
    exact = version if len(version) > 2 else (*version, 1)  # "rocm7.2": some 7.2
    if any(low <= exact < high for low, high in GOOD_ROCM):
        return Finding("ok", saw, why="works with this kernel")
    if version >= (8,):
        why = "no report of training with it on gfx1151 was found"
        return Finding("warn", saw, INSTALL_ROCM_TORCH, why)
    why = "6.4, 7.1, 7.9 and 7.10 do not work with the kernels that this GPU needs"
    return Finding("fail", saw, INSTALL_ROCM_TORCH, why)


@check("bitsandbytes", source=BNB_SOURCE)
def bitsandbytes(view: HostView) -> Finding:
    """Check the version of bitsandbytes and its library for the ROCm major of torch.

    It chooses a library by torch's HIP version: `libbitsandbytes_rocm72.so` is for 7.2,
    `…_rocm714.so` for 7.14.
    """
    version = view.package_version("bitsandbytes")
    if version is None:
        why = "4-bit training (qlora) needs it; lora and full do not"
        return Finding("unknown", "bitsandbytes is not installed", INSTALL_BITSANDBYTES, why)
    saw = f"bitsandbytes {version}"
    if torch_build(view) != "rocm":
        return Finding("ok", saw, why="4-bit training")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 50):
        why = (
            "its wave size is wrong for this GPU: NF4 with block size 64, the default, gives"
            " garbage, and block size 32 crashes"
        )
        return Finding("fail", f"{saw} with a ROCm build of torch", INSTALL_BITSANDBYTES, why)
    rocm = rocm_version(view)
    hip = _hip_numbers(view) or (HIP_OF_ROCM.get(rocm[0], rocm[:2]) if rocm else ())
    files = view.package_folder("bitsandbytes").glob("libbitsandbytes_rocm*.so")
    digits = [path.stem.rpartition("rocm")[2].replace(".", "") for path in files]
    libraries = [(int(d[0]), int(d[1:])) for d in digits if d.isdigit() and len(d) > 1]
    if not hip or not libraries:
        why = "without a library for torch's ROCm major, nothing works in 4 bits"
        fix = Fix("print what it loads", ("python -m bitsandbytes",))
        return Finding("unknown", f"{saw}; its ROCm libraries could not be listed", fix, why)
    used = max((row for row in libraries if row[0] == hip[0] and row <= hip), default=None)
    if used is None:
        why = "qlora and 8-bit optimizers raise 'not found': wheels up to 0.50.2 stop at HIP 7"
        source = f"{BNB_SOURCE}; patientx-cfz/comfyui-rocm#113"
        saw = f"{saw} has no library for HIP {_shown(hip)}"
        return Finding("fail", saw, INSTALL_ROCM_TORCH, why, source)
    saw = f"{saw}: its library for ROCm {_shown(used)} serves HIP {_shown(hip)}"
    if not rocm or rocm[0] == hip[0] or used == hip:
        return Finding("ok", saw, why="it takes the nearest lower library of the same major")
    return Finding(
        "warn",
        f"{saw}, which is ROCm {_shown(rocm)}'s",
        Fix("read the result of check nf4: if it is ok, 4-bit weights are right here"),
        "unproved on this GPU: the library loads with a warning, and no report of 4-bit training"
        " with it was found; the NF4 round trip decides",
        "bitsandbytes 0.50.2: cextension.py, cuda_specs.py; shootthesound/Fizgig PR #103",
    )


NOTEBOOK_KERNEL = "python3"
"""The kernel that the notebooks ask for."""


def _first_kernel(view: HostView) -> tuple[str, str]:
    """File of the kernel that would start, and its program; folders in Jupyter's order."""
    given = [path for path in view.environ.get("JUPYTER_PATH", "").split(":") if path]
    user = view.environ.get("JUPYTER_DATA_DIR") or f"{view.home}/.local/share/jupyter"
    own = [f"{view.prefix}/share/jupyter", user]
    if view.environ.get("JUPYTER_PREFER_ENV_PATH", "1") in ("0", "no", "false"):
        own.reverse()
    for folder in (*given, *own, "/usr/local/share/jupyter", "/usr/share/jupyter"):
        path = f"{folder}/kernels/{NOTEBOOK_KERNEL}/kernel.json"
        try:
            return path, str(json.loads(view.read(path) or "")["argv"][0])
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            continue
    return "the kernel that comes with ipykernel", "python"


@check("jupyter", source="https://jupyter-client.readthedocs.io/en/stable/kernels.html")
def jupyter(view: HostView) -> Finding:
    """Check JupyterLab and the kernel of the notebooks."""
    if view.package_version("jupyterlab") is None or view.package_version("ipykernel") is None:
        saw = f"JupyterLab or ipykernel is not installed in {view.prefix}"
        return Finding("unknown", saw, SETUP, "the notebooks and strixft run need them")
    file, program = _first_kernel(view)
    # the server replaces a bare `python` by its own interpreter
    if "/" not in program or Path(program).parent == Path(view.prefix) / "bin":
        return Finding("ok", file, why="notebooks run in this environment")
    say = "make this environment's kernel the first; strixft lab does so by itself"
    install = f"-m ipykernel install --user --name {NOTEBOOK_KERNEL}"
    return Finding(
        "warn",
        f"kernel {NOTEBOOK_KERNEL} starts {program} ({file}), and this is {view.prefix}",
        Fix(say, (f"{shlex.quote(view.prefix)}/bin/python {install}",)),
        "notebooks would run in another environment, without strixft or with another torch",
    )


RUN_HERE = "run here, in a child process"

SHOW_STEPS = ("python -m strixft.doctor.probe_child /dev/stderr",)
"""Shows the steps and every line that torch writes."""

SHOW_ERROR = Fix("read the whole error", SHOW_STEPS)


def _probe(view: HostView) -> Probe | None:
    probe = view.probe()
    return None if probe is None or probe.ended == "no torch" else probe


@check("torch", source=RUN_HERE, needs_torch=True)
def torch(view: HostView) -> Finding | None:
    """Check that torch imports and that its first kernel on the device ends."""
    if (probe := _probe(view)) is None:
        return None
    if (problem := probe.problem("import")) is not None:
        fix, why = SHOW_ERROR, "nothing can be trained"
        if probe.ended == "timed out":
            why = "a hang in the first kernel means a kernel below the floor or bad firmware"
        elif view.strix_halo is not None:
            fix = INSTALL_ROCM_TORCH
            why = f"a broken or foreign build; {ROCM_TORCH} is the one for gfx1151"
        source = f"{RUN_HERE}; ROCm/TheRock#5763"
        return Finding("fail", f"torch did not start: {problem}", fix, why, source)
    figures, needed = probe.steps.get("import", {}), needed_build(view)
    saw = f"torch {figures.get('version')} on {figures.get('device')}"
    if figures.get("device") == "cpu" and needed != "cpu":
        saw = f"{saw}: torch.cuda.is_available() is False"
        why = "torch does not use the GPU of this machine: the build, the driver or access to it"
        command = "rocminfo | head -40" if needed == "rocm" else "nvidia-smi"
        fix = Fix("first fix the other failures listed here, then ask the driver", (command,))
        if torch_build(view) != needed:
            fix = INSTALL_ROCM_TORCH if needed == "rocm" else INSTALL_CUDA_TORCH
        return Finding("fail", saw, fix, why)
    arch, known = str(figures.get("arch") or ""), figures.get("arch_list")
    if isinstance(known, list) and arch.startswith("gfx"):
        names = list(map(str, known))
        if not any(name.startswith(arch) for name in names):
            saw = f"{saw}, {arch} is not in its list {' '.join(names)}"
            why = "it has no kernels for this GPU: 'invalid device function' at the first one"
            return Finding("fail", saw, INSTALL_ROCM_TORCH, why, f"{RUN_HERE}; {FINETUNE_GUIDE}")
    total = figures.get("total_bytes")
    memory = f", {format_gib(total)} by its own count" if total else ""
    return Finding("ok", saw + memory, why="it imports and computes")


def _torch_step(
    name: str,
    step: str,
    saw: str,
    why: str,
    fix: Fix = SHOW_ERROR,
    source: str = "",
    failed: Status = "fail",
) -> Check:
    """Build the check of one step of the child: its problem, or what it measured.

    Args:
        name: Name of the check.
        step: Name of the step in the child.
        saw: Text where it works, formatted with the step's figures.
        why: As in `Check`.
        fix: What to do where it does not work.
        source: As in `Check`, beside the run itself.
        failed: `warn` where training has a replacement.
    """

    def look(view: HostView) -> Finding | None:
        probe = _probe(view)
        if probe is None or probe.problem("import") is not None:
            return None
        problem, figures = probe.problem(step), probe.steps.get(step)
        if problem is not None:
            return Finding(failed, problem, fix)
        if figures is None:
            first = Fix(f"first make '{probe.at}' work", SHOW_STEPS)
            return Finding("unknown", f"not reached: {probe.ended} at {probe.at}", first)
        skipped = str(figures.get("skipped", ""))
        if "not installed" in skipped:
            return Finding("unknown", skipped, SETUP)
        return Finding("ok", skipped or saw.format(**figures))

    source = f"{RUN_HERE}; {source}" if source else RUN_HERE
    return Check(name, look, why, source, needs_torch=True)


TORCH_STEPS = (
    _torch_step(
        "nf4",
        step="nf4",
        saw="bitsandbytes {version}: error {relative_error} after a round trip",
        why="qlora trains on these weights; a wrong wave size gave garbage for NF4 in blocks of 64,"
        " without an error",
        fix=INSTALL_BITSANDBYTES,
        source=BNB_SOURCE,
    ),
    _torch_step(
        "attention",
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
    _torch_step(
        "flex-attention",
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
    _torch_step(
        "fused-head",
        step="head",
        saw="the chunked head is right, forward and backward (error {relative_error:.2g})",
        why="training takes the loss and its gradient from it, without the logits of all tokens",
        source="strixft.step.loss",
    ),
    _torch_step(
        "training-step",
        step="step",
        saw="three LoRA updates of a tiny model: loss {losses[0]:.3f} → {losses[2]:.3f}",
        why="it uses everything that training uses, at once",
    ),
)
