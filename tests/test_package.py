"""The wheel is complete: installed alone, it finds its recipes and notebooks in itself."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from strixft.run.folder import STAGES


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY)
    subprocess.run([sys.executable, *build], check=True)
    (path,) = folder.glob("strixft-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that holds the wheel; dependencies are the parent's."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    subprocess.run([sys.executable, *install], check=True)
    # a folder added by a .pth file has its own .pth files ignored, so that the checkout stays out
    (site_packages(python) / "parent.pth").write_text(sysconfig.get_path("purelib"))
    return python


def site_packages(python: Path) -> Path:
    """Where an environment keeps its packages."""
    (folder,) = python.parent.parent.glob("lib/python*/site-packages")
    return folder


def run_in(folder: Path, *command: str | Path) -> str:
    """What a command prints in a folder, without a search path of ours."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_recipes_that_ship_are_found_inside_the_package(python: Path, tmp_path: Path) -> None:
    found = json.loads(run_in(tmp_path, python.with_name("strixft"), "recipe", "--json"))
    package = site_packages(python) / "strixft"
    assert found["demo"] == str(package / "recipes" / "demo.yaml")
    assert {Path(path).parent for path in found.values()} == {package / "recipes"}


def test_every_recipe_of_the_repository_ships(python: Path, tmp_path: Path) -> None:
    found = json.loads(run_in(tmp_path, python.with_name("strixft"), "recipe", "--json"))
    assert set(found) == {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}


def test_the_data_of_the_demo_ship_with_it(python: Path, tmp_path: Path) -> None:
    shown = run_in(tmp_path, python.with_name("strixft"), "recipe", "demo", "--json")
    source = Path(json.loads(shown)["dataset"]["source"])
    assert source.is_relative_to(site_packages(python))
    assert source.read_bytes() == (REPOSITORY / "recipes/data/home-lab.jsonl").read_bytes()


def test_the_notebook_of_every_stage_ships(python: Path, tmp_path: Path) -> None:
    script = (
        "from strixft.recipe.find import shipped;"
        "print(*sorted(path.name for path in shipped('notebooks').iterdir()))"
    )
    names = run_in(tmp_path, python, "-c", script).split()
    assert names == sorted(path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
    assert len(names) >= len(STAGES)


def test_the_wheel_holds_no_tests_and_nothing_compiled(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "test" in name]
    assert not [name for name in names if name.endswith(".pyc")]


def test_everything_that_lies_beside_the_code_is_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    beside = [
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "strixft").rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert "strixft/data/general.jsonl" in beside
    assert set(beside) <= packed
