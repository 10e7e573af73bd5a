"""`VARIABLES`: environment variables that help or hurt, one row each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strixft.catalog.hosts import AMD_VENDOR
from strixft.catalog.methods import METHODS
from strixft.doctor.finding import Finding, Fix, Status
from strixft.doctor.packages import has_rocm_torch, needed_build
from strixft.doctor.view import HostView
from strixft.probe.checks import KNOWN_ISSUES
from strixft.support.environment import OVERRIDE, OVERRIDE_WHY

GUIDE = "h34v3nzc0dex/strix-halo-llm-finetune-guide: README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable and when it is wrong."""

    name: str
    is_wrong: Callable[[str | None, HostView], bool]
    """Gets its value, None where it is not set."""
    status: Status
    why: str
    source: str
    value: str | None = None
    """What it should be; None: not set at all."""


def _is_set(value: str | None, view: HostView) -> bool:
    return value is not None


def _is_on(value: str | None, view: HostView) -> bool:
    return value not in (None, "", "0")


def _hides_gpu(value: str | None, view: HostView) -> bool:
    """Empty, or a first number below zero, hides all of them."""
    hides = value is not None and (not value.strip() or value.strip().startswith("-"))
    return hides and needed_build(view) != "cpu"


def _is_set_on_amd(value: str | None, view: HostView) -> bool:
    return value is not None and AMD_VENDOR in view.vendors


def _trains_base(value: str | None, view: HostView) -> bool:
    if view.recipe is None or not _is_on(value, view):
        return False
    return METHODS[view.recipe.method].adapter == "none"


def _rocm_without(value: str | None, view: HostView) -> bool:
    return value != "1" and has_rocm_torch(view) and view.strix_halo is not None


VARIABLES = (
    Variable(
        name=OVERRIDE,
        is_wrong=_is_set_on_amd,
        status="fail",
        why=OVERRIDE_WHY,
        source=f"ROCm/ROCm#5824; {GUIDE} (measured)",
    ),
    *(
        Variable(
            name=name,
            is_wrong=lambda value, view: "backend:malloc" in (value or ""),
            status="fail",
            why="backend:malloc crashes PyTorch",
            source=f"{GUIDE}; pytorch/pytorch#187343",
            value="expandable_segments:True",
        )
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    ),
    *(
        Variable(
            name=name,
            is_wrong=_hides_gpu,
            status="fail",
            why="it hides every GPU from torch",
            source="https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html",
        )
        for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    ),
    Variable(
        name="STRIXFT_DEVICE",
        is_wrong=lambda value, view: value == "cpu" and bool(view.strix_halo),
        status="warn",
        why="training stays on the CPU although there is a GPU",
        source="strixft.guard",
    ),
    Variable(
        name="TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
        is_wrong=_rocm_without,
        status="warn",
        why="attention is 10 to 30 times slower without it; it must be there before torch starts",
        source="lhl/strix-halo-testing: torch-therock/README.md; bkpaine1/amdsense (measured)",
        value="1",
    ),
    *(
        Variable(
            name=name,
            is_wrong=_trains_base,
            status="warn",
            why=f"this recipe trains every weight, and {KNOWN_ISSUES['weight-gradient'].what}",
            source=KNOWN_ISSUES["weight-gradient"].source,
        )
        for name in ("ROCBLAS_USE_HIPBLASLT", "TORCH_BLAS_PREFER_HIPBLASLT")
    ),
    Variable(
        name="HSA_ENABLE_SDMA",
        is_wrong=lambda value, view: value == "0",
        status="warn",
        why="it turns the copy engines off; it is for a diagnosis, not for work",
        source="issue threads of ROCm/ROCm (#6530, #5853)",
    ),
    Variable(
        name="HSA_XNACK",
        is_wrong=_is_set_on_amd,
        status="warn",
        why="nothing here needs it; start without overrides",
        source="ianbarber/strix-halo-skills: SKILL.md",
    ),
    *(
        Variable(
            name=name,
            is_wrong=_is_on,
            status="warn",
            why="every kernel waits for the one before: for a diagnosis, not for work",
            source="https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html",
        )
        for name in ("HIP_LAUNCH_BLOCKING", "CUDA_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL")
    ),
    Variable(
        name="MKL_DEBUG_CPU_TYPE",
        is_wrong=_is_set,
        status="warn",
        why="MKL ignores it since 2020 update 1; strixft mkl does what it once did",
        source="https://danieldk.eu/Intel-MKL-on-AMD-Zen",
    ),
)


def _set_or_unset(variable: Variable) -> Fix:
    if variable.value is not None:
        line = f"export {variable.name}={variable.value}"
        return Fix(
            "set it now, and for every shell that comes",
            (line, f"echo '{line}' >> ~/.profile"),
            "start Python, or the notebook's kernel, again",
        )
    where = "~/.profile ~/.bashrc ~/.zshrc /etc/environment /etc/profile.d"
    return Fix(
        "take it away now, and where it is set",
        (f"unset {variable.name}", f"grep -rn {variable.name} {where}"),
        "start Python, or the notebook's kernel, again",
    )


def check_environment(view: HostView) -> Iterator[Finding]:
    """Variables that help or hurt."""
    wrong = [v for v in VARIABLES if v.is_wrong(view.environ.get(v.name), view)]
    for variable in wrong:
        value = view.environ.get(variable.name)
        yield Finding(
            status=variable.status,
            saw=f"{variable.name} is not set" if value is None else f"{variable.name}={value}",
            why=variable.why,
            fix=_set_or_unset(variable),
            source=variable.source,
        )
    if not wrong:
        names = ", ".join(variable.name for variable in VARIABLES)
        yield Finding(
            status="ok",
            saw="no variable that hurts",
            why=f"looked at {names}",
            source=GUIDE,
        )


KERNEL = "python3"
"""What the notebooks ask for."""

SOURCE = "https://jupyter-client.readthedocs.io/en/stable/kernels.html"


def _spec_folders(view: HostView) -> list[str]:
    """Where Jupyter looks for kernels, in its order."""
    given = [path for path in view.environ.get("JUPYTER_PATH", "").split(":") if path]
    user = view.environ.get("JUPYTER_DATA_DIR") or f"{view.home}/.local/share/jupyter"
    environment = f"{view.prefix}/share/jupyter"
    preferred = view.environ.get("JUPYTER_PREFER_ENV_PATH", "1") not in ("0", "no", "false")
    own = [environment, user] if preferred else [user, environment]
    return [*given, *own, "/usr/local/share/jupyter", "/usr/share/jupyter"]


def _first_spec(view: HostView) -> tuple[str, str] | None:
    """File of the kernel that would start, and the program in it."""
    for folder in _spec_folders(view):
        path = f"{folder}/kernels/{KERNEL}/kernel.json"
        try:
            program = json.loads(view.read(path) or "")["argv"][0]
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            continue
        return path, str(program)
    return None


def _is_ours(program: str, prefix: str) -> bool:
    """A bare `python` is replaced by the interpreter of the server."""
    return "/" not in program or Path(program).parent == Path(prefix) / "bin"


def check_jupyter(view: HostView) -> Iterator[Finding]:
    """JupyterLab and its kernel."""
    if view.package_version("jupyterlab") is None or view.package_version("ipykernel") is None:
        yield Finding(
            status="unknown",
            saw=f"JupyterLab or ipykernel is not installed in {view.prefix}",
            why="the notebooks and strixft run need them",
            fix=Fix("install the environment", ("make setup",)),
            source=SOURCE,
        )
        return
    found = _first_spec(view)
    if found is None or _is_ours(found[1], view.prefix):
        where = found[0] if found else "the kernel that comes with ipykernel"
        why = "notebooks run in this environment"
        yield Finding(status="ok", saw=where, why=why, source=SOURCE)
        return
    yield Finding(
        status="warn",
        saw=f"kernel {KERNEL} starts {found[1]} ({found[0]}), and this is {view.prefix}",
        why="notebooks would run in another environment, without strixft or with another torch",
        fix=Fix(
            "make this environment's kernel the first; strixft lab does so by itself",
            (f"{shlex.quote(view.prefix)}/bin/python -m ipykernel install --user --name {KERNEL}",),
        ),
        source=SOURCE,
    )
