"""Environment, Makefile and container: one set of versions, clean shell, the right flags."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from recorded import RECORDED, Recorded

from strixft.doctor.devices import CONTAINER_FLAGS
from strixft.doctor.packages import ROCM_INDEX, ROCM_TORCH, needed_build
from strixft.model.files import WHEEL

CONTAINER = REPOSITORY / "container"
TOOLBOX = CONTAINER / "toolbox.sh"
SHELL = [TOOLBOX, REPOSITORY / "dev/which-torch.sh"]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def _container_file() -> tuple[dict[str, str], str]:
    """Arguments of the Containerfile, and its text with the arguments put in."""
    text = (CONTAINER / "Containerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    return arguments, re.sub(r"\$\{?(\w+)\}?", lambda m: arguments.get(m[1], m[0]), text)


def _pip_section() -> list[str]:
    parts = ENVIRONMENT["dependencies"]
    lines: list[str] = next(part["pip"] for part in parts if isinstance(part, dict))
    return lines


def _made(variable: str) -> str:
    found = re.search(rf"^{variable} := (.*)$", MAKEFILE, re.MULTILINE)
    assert found, variable
    return found[1].strip()


# one set of versions


def test_the_rocm_build_is_the_same_everywhere() -> None:
    arguments, _ = _container_file()
    torch = [line for line in _pip_section() if line.startswith("torch")]
    assert torch == [ROCM_TORCH]
    assert _made("TORCH_REQUIREMENT_rocm") == ROCM_TORCH
    assert arguments["TORCH"] == ROCM_TORCH


def test_the_index_is_the_same_everywhere() -> None:
    arguments, _ = _container_file()
    assert f"--extra-index-url {ROCM_INDEX}" in _pip_section()
    assert _made("TORCH_INDEX_rocm") == f"--index-url {ROCM_INDEX}"
    assert arguments["TORCH_INDEX"] == ROCM_INDEX


def test_the_demo_model_is_the_same_everywhere() -> None:
    arguments, _ = _container_file()
    assert _made("SMOLLM2") == arguments["SMOLLM2"] == WHEEL
    assert WHEEL in (REPOSITORY / "environment.yml").read_text()


@pytest.mark.parametrize("build", ["cpu", "cuda", "rocm"])
def test_every_torch_is_in_the_projects_range(build: str) -> None:
    wanted = next(row for row in PROJECT["dependencies"] if Requirement(row).name == "torch")
    version = Requirement(_made(f"TORCH_REQUIREMENT_{build}")).specifier
    number = str(version).removeprefix("==").replace("*", "0")
    assert Requirement(wanted).specifier.contains(number)


def test_python_is_in_the_projects_range() -> None:
    python = next(p for p in ENVIRONMENT["dependencies"] if str(p).startswith("python="))
    _, text = _container_file()
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.12")
    assert python == "python=3.12"
    assert set(re.findall(r"python(3\.\d+)", text)) == {"3.12"}


def test_the_environment_installs_the_project_and_repeats_none_of_its_packages() -> None:
    names = {Requirement(row).name for row in PROJECT["dependencies"]} - {"torch"}
    listed = [line for line in _pip_section() if not line.startswith("-")]
    assert "--editable ." in _pip_section()
    assert not names & {Requirement(line).name for line in listed}
    assert ENVIRONMENT["channels"] == ["conda-forge"]


# make setup TORCH=…


@pytest.mark.parametrize("host", RECORDED, ids=lambda host: host.name)
def test_auto_chooses_what_doctor_would(host: Recorded, tmp_path: Path) -> None:
    view = host.view(tmp_path)
    words = ["sh", str(REPOSITORY / "dev/which-torch.sh"), str(tmp_path)]
    chosen = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    needed = needed_build(view)
    driver = {"rocm": "/dev/kfd", "cuda": "/proc/driver/nvidia/version", "cpu": "/proc"}[needed]
    assert chosen == needed if view.exists(driver) else chosen == "cpu"


def _make(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--dry-run", "--always-make", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@needs_make
@pytest.mark.parametrize("build", ["cpu", "cuda", "rocm"])
def test_make_setup_installs_the_chosen_build(build: str) -> None:
    shown = _make("setup", f"TORCH={build}").stdout
    assert _made(f"TORCH_REQUIREMENT_{build}") in shown
    assert (ROCM_INDEX in shown) == (build == "rocm")
    assert f".venv/.installed-{build}" in shown


@needs_make
def test_make_refuses_another_word() -> None:
    done = _make("setup", "TORCH=vulkan")
    assert done.returncode
    assert "none of auto, cpu, rocm, cuda" in done.stderr


# shell


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed: pip install -e .[dev]")
    return path


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_is_clean(path: Path) -> None:
    done = subprocess.run(
        [_tool("shellcheck"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert os.access(path, os.X_OK)


def test_the_containerfile_is_clean() -> None:
    command = [_tool("hadolint"), str(CONTAINER / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_the_containers_steps_are_shell() -> None:
    _, text = _container_file()
    steps = re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert len(steps) == 4
    for step in steps:
        subprocess.run(["bash", "-n", "-c", step], check=True)


def test_what_the_image_copies_is_enough_for_the_wheel(tmp_path: Path) -> None:
    _, text = _container_file()
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (.*)$", text, re.MULTILINE)]
    kept = {
        line[1:] for line in (REPOSITORY / ".dockerignore").read_text().split() if line[0] == "!"
    }
    names = [name for names in copied for name in names]
    assert set(names) == kept
    for name in names:
        source = REPOSITORY / name
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        "w",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "hatchling" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("hatchling cannot be installed here")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "w").glob("strixft-*.whl"))


# toolbox.sh


def _dry_run(tmp_path: Path, engine: str, *words: str) -> str:
    """What toolbox.sh would run, with an engine of that name."""
    (tmp_path / engine).write_text("#!/bin/sh\n")
    (tmp_path / engine).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": "/home/user",
        "STRIXFT_DRY_RUN": "1",
        "STRIXFT_ENGINE": engine,
    }
    command = ["bash", str(TOOLBOX), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_toolbox_gets_the_gpu(tmp_path: Path) -> None:
    words = shlex.split(_dry_run(tmp_path, "toolbox", "create"))
    assert words[:5] == ["toolbox", "create", "--image", "localhost/strixft:latest", "strixft"]
    assert words[5] == "--"
    assert words[6:] == CONTAINER_FLAGS.split()


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_a_container_gets_the_gpu_and_the_home_folder(tmp_path: Path, engine: str) -> None:
    line = _dry_run(tmp_path, engine, "create")
    for part in ("--device /dev/kfd", "--device /dev/dri", "seccomp=unconfined", "--group-add"):
        assert part in line
    assert "--volume /home/user:/home/user" in line
    assert "--privileged" not in line
    assert "--publish" not in line


def test_podman_keeps_the_users_groups(tmp_path: Path) -> None:
    line = _dry_run(tmp_path, "podman", "create")
    assert "--userns keep-id" in line
    assert "--group-add keep-groups" in line


@pytest.mark.parametrize("engine", ["toolbox", "podman", "docker"])
def test_update_builds_again_and_creates_again(tmp_path: Path, engine: str) -> None:
    lines = _dry_run(tmp_path, engine, "update").splitlines()
    program = "docker" if engine == "docker" else "podman"
    assert lines[0].startswith(f"{program} build --pull --no-cache --file ")
    assert " rm " in lines[1]
    assert " create " in lines[2]


def test_enter_runs_a_command(tmp_path: Path) -> None:
    shown = _dry_run(tmp_path, "toolbox", "enter", "strixft", "doctor").strip()
    assert shown == "toolbox run --container strixft strixft doctor"
    assert "exec --interactive --tty" in _dry_run(tmp_path, "podman", "enter")


def test_an_unknown_command_and_a_missing_engine_have_a_fix(tmp_path: Path) -> None:
    for words, engine in ((["fly"], "podman"), (["create"], "no-such-engine")):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "STRIXFT_ENGINE": engine}
        command = ["bash", str(TOOLBOX), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "fix: " in done.stderr


# the service


def test_the_service_is_for_this_machine_only() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CONTAINER / "strixft-lab.container")
    container = unit["Container"]
    assert container["Network"] == "host"
    assert container["Exec"].split()[:3] == ["strixft", "lab", "--no-browser"]
    assert "PublishPort" not in container
    assert container["Image"] == "localhost/strixft:latest"
    assert container["Secret"].endswith("target=JUPYTER_TOKEN")
    devices = re.findall(
        r"^AddDevice=(\S+)$", (CONTAINER / "strixft-lab.container").read_text(), re.M
    )
    assert devices == ["/dev/kfd", "/dev/dri"]
