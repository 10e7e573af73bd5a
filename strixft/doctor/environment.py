"""Checks of the environment: `VARIABLES` that help or hurt, and the kernel of the notebooks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.methods import METHODS
from strixft.doctor.devices import GPU_ISOLATION
from strixft.doctor.finding import Finding, Fix, Status
from strixft.doctor.kernel import FINETUNE_GUIDE
from strixft.doctor.packages import needed_build, torch_build
from strixft.doctor.view import HostView
from strixft.support.environment import OVERRIDE, OVERRIDE_WHY


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


def _set_or_unset(name: str, value: str | None) -> Fix:
    line = f"export {name}={value}"
    say, commands = "set it now and for every later shell", (line, f"echo '{line}' >> ~/.profile")
    if value is None:
        files = "~/.profile ~/.bashrc ~/.zshrc /etc/environment /etc/profile.d"
        say = "unset it now and remove it where it is set"
        commands = (f"unset {name}", f"grep -rn {name} {files}")
    return Fix(say, commands, "restart Python, or the notebook's kernel")


def check_environment(view: HostView) -> Iterator[Finding]:
    """Check the variables that help or hurt."""
    pairs = [(name, row) for row in VARIABLES for name in row.names]
    wrong = [(name, row) for name, row in pairs if row.is_wrong(view.environ.get(name), view)]
    for name, row in wrong:
        value = view.environ.get(name)
        saw = f"{name} is not set" if value is None else f"{name}={value}"
        yield Finding(row.status, saw, row.why, row.source, _set_or_unset(name, row.value))
    if not wrong:
        why = f"checked {', '.join(name for name, _ in pairs)}"
        yield Finding("ok", "no variable that hurts", why, FINETUNE_GUIDE)


NOTEBOOK_KERNEL = "python3"
"""The kernel that the notebooks ask for."""


def _first_kernel(view: HostView) -> tuple[str, str] | None:
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
    return None


def check_jupyter(view: HostView) -> Finding:
    """Check JupyterLab and the kernel of the notebooks."""
    source = "https://jupyter-client.readthedocs.io/en/stable/kernels.html"
    if view.package_version("jupyterlab") is None or view.package_version("ipykernel") is None:
        saw = f"JupyterLab or ipykernel is not installed in {view.prefix}"
        fix = Fix("install the environment", ("make setup",))
        return Finding("unknown", saw, "the notebooks and strixft run need them", source, fix)
    file, program = _first_kernel(view) or ("the kernel that comes with ipykernel", "python")
    # the server replaces a bare `python` by its own interpreter
    if "/" not in program or Path(program).parent == Path(view.prefix) / "bin":
        return Finding("ok", file, "notebooks run in this environment", source)
    say = "make this environment's kernel the first; strixft lab does so by itself"
    install = f"-m ipykernel install --user --name {NOTEBOOK_KERNEL}"
    return Finding(
        "warn",
        f"kernel {NOTEBOOK_KERNEL} starts {program} ({file}), and this is {view.prefix}",
        "notebooks would run in another environment, without strixft or with another torch",
        source,
        Fix(say, (f"{shlex.quote(view.prefix)}/bin/python {install}",)),
    )
