"""The kernel that notebooks start: is it this environment?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from strixft.doctor.finding import Finding, Fix
from strixft.doctor.view import HostView

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
