"""JupyterLab on this machine with a kernel of this environment, and copies of the notebooks."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import sys
from pathlib import Path

import strixft
from strixft.recipe.find import shipped, workspace
from strixft.support.environment import BEFORE_TORCH
from strixft.support.errors import HostError
from strixft.support.files import cache_folder, digest, write_json
from strixft.support.progress import say
from strixft.support.text import typed

ADDRESS = "127.0.0.1"

START = "start-here.ipynb"

KNOWN = ".shipped.json"
"""File beside copies of notebooks: the SHA-256 of each as it was copied."""

KERNEL_ENDS_S = 120
"""Seconds for a training kernel to save its last update; Jupyter's own 5 s are too few."""

DISABLED = ("@jupyterlab/apputils-extension:announcements",)
"""Parts of JupyterLab that are off: this one asks on the first page whether to fetch news."""

SETTINGS = {
    # else a notebook that is opened again says "Error displaying widget: model not found"
    "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
    # what was typed should survive a reload; its 120 s are too long for that
    "@jupyterlab/docmanager-extension:plugin": {"autosaveInterval": 10},
    # rendering only what is in sight leaves a blank page where an output gets shorter
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "defer"},
}
"""Settings of JupyterLab by plugin, which a user's own take the place of."""

LONGEST_MESSAGE = 2**31 - 1
"""Bytes of a message to a kernel. An upload is one; Jupyter's own 10 MB would close the connection
without a word, and no browser reads a file of 2 GiB."""

KERNEL = "python3"
"""Kernel name in the notebooks. The first kernel found under it runs them."""


def kernel_folder() -> Path:
    """Return the folder of this environment's kernel; containers share a home folder.

    It is not in the environment itself, which a container's user may not be allowed to write.
    """
    return cache_folder() / "jupyter" / hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]


def write_kernel(folder: Path) -> Path:
    """Write a kernel of this environment, and the page's settings, below a folder for Jupyter."""
    path = folder / "kernels" / KERNEL / "kernel.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {
        "argv": words,
        "display_name": f"strixft ({Path(sys.prefix).name})",
        "language": "python",
        "env": {name: os.environ[name] for name in BEFORE_TORCH},
    }
    path.write_text(json.dumps(spec, indent=2) + "\n")
    page = folder / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps({"disabledExtensions": dict.fromkeys(DISABLED, True)}) + "\n")
    page.with_name("default_setting_overrides.json").write_text(json.dumps(SETTINGS) + "\n")
    server = {"tornado_settings": {"websocket_max_message_size": LONGEST_MESSAGE}}
    config = folder / "jupyter_server_config.json"
    config.write_text(json.dumps({"ServerApp": server}) + "\n")
    return path


def put_notebooks(folder: Path) -> Path:
    """Copy the notebooks that ship into a working folder, and return where they are.

    In a clone they are copied into `runs/`, so that opening them leaves the clone as it is. A copy
    that nobody edited is replaced by a newer one; beside an edited one the newer gets its version's
    name.

    Raises:
        HostError: The folder cannot be written.
    """
    ours, copies = shipped("notebooks"), folder / "notebooks"
    if copies.resolve() == ours.resolve():
        copies = folder / "runs" / "notebooks"
    try:
        _copy(ours, copies)
    except OSError as error:
        raise HostError(
            f"the notebooks cannot be copied to {copies}: {error.strerror}",
            fix="mkdir -p ~/strixft && cd ~/strixft && strixft lab   or another folder of yours",
        ) from error
    return copies


def _copy(ours: Path, copies: Path) -> None:
    copies.mkdir(parents=True, exist_ok=True)
    known_file = copies / KNOWN
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    for notebook in ours.glob("*.ipynb"):
        copy, newest, last = copies / notebook.name, digest(notebook), known.get(notebook.name)
        if copy.exists() and digest(copy) != last:  # somebody's own
            copy = copies / f"{notebook.stem}-{strixft.__version__}.ipynb"
        if last != newest or not copy.parent.joinpath(notebook.name).exists():
            shutil.copy(notebook, copy)
        known[notebook.name] = newest
    write_json(known_file, known)


def lab_environment(kernels: Path) -> dict[str, str]:
    """Return the environment variables, with the kernel first and a token if there is none."""
    environment = dict(os.environ)
    for name in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        paths = filter(None, (str(kernels), os.environ.get(name)))
        environment[name] = os.pathsep.join(paths)
    environment["JUPYTER_TOKEN"] = environment.get("JUPYTER_TOKEN") or secrets.token_urlsafe(24)
    return environment


def lab_command(folder: Path, start: Path, *, port: int, browser: bool) -> list[str]:
    """Return the command that starts JupyterLab in a folder, reachable from this machine only.

    Args:
        folder: The folder that it shows.
        start: The notebook in it that it opens.
        port: Its port.
        browser: Open a browser.
    """
    words = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.ip={ADDRESS}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",  # the address that was told, or none
        f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url={page_of(folder, start)}",
        f"--KernelManager.shutdown_wait_time={KERNEL_ENDS_S}",
    ]
    words += [] if browser else ["--no-browser", "--ServerApp.log_level=WARN"]
    return words + (["--allow-root"] if os.geteuid() == 0 else [])


def start_lab(*, port: int = 8888, browser: bool = True) -> None:
    """Become JupyterLab; does not return.

    Args:
        port: Port; the next free one is used if it is taken.
        browser: Open a browser.
    """
    folder = workspace()
    start = put_notebooks(folder) / START
    kernels = kernel_folder()
    write_kernel(kernels)
    port = free_port(port)
    command = lab_command(folder, start, port=port, browser=browser)
    environment = lab_environment(kernels)
    if not browser:
        say(how_to_open(port, page_of(folder, start), environment["JUPYTER_TOKEN"]))
    os.execve(command[0], command, environment)


def free_port(port: int) -> int:
    """Return the first port from this one on that nobody listens on.

    Raises:
        HostError: There is none among the next hundred.
    """
    for one in range(port, min(port + 100, 65536)):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((ADDRESS, one))
            except OSError:
                continue
            return one
    raise HostError(f"no port from {port} on is free", fix="strixft lab --port 9000")


def page_of(folder: Path, notebook: Path) -> str:
    """Return the address of a notebook in a lab that shows a folder."""
    return f"/lab/tree/{notebook.relative_to(folder).as_posix()}"


def how_to_open(port: int, page: str, token: str) -> str:
    """Return what to type to open the lab here, from another machine, and as a service."""
    host = f"{getpass.getuser()}@{platform.node()}"
    return (
        f"open:                  http://{ADDRESS}:{port}{page}?token={token}\n"
        f"from another machine:  ssh -N -L {port}:{ADDRESS}:{port} {host}   then open the same"
        " address there\n"
        "as a service:          systemd-run --user --unit=strixft-lab --setenv=JUPYTER_TOKEN=…"
        f" --working-directory={typed(workspace())} {typed(sys.executable)} -m strixft lab"
        " --no-browser"
    )
