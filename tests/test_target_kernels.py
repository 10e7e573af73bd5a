"""Our own kernels compile for gfx1151; where a recipe's do not, plan and doctor go by the table."""

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import REPOSITORY, WriteRecipe
from recorded import GOOD

from strixft.catalog import target_kernels
from strixft.catalog.hosts import HOSTS
from strixft.catalog.target_kernels import recipe_kernels
from strixft.doctor.checks import examine
from strixft.model.source import load_config
from strixft.plan.result import plan_figures
from strixft.probe.job import Job
from strixft.recipe.load import load_recipe

TOOL = Path(__file__).parent.parent / "dev" / "target_kernels.py"


def test_our_own_kernels_compile_for_the_target(tmp_path: Path) -> None:
    """In a process of its own: the tool tells Triton and inductor that this is the target."""
    pytest.importorskip("triton", reason="pip install triton")
    command = [sys.executable, str(TOOL), "own"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOL.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "`" in line]
    assert len({name.split(":")[0] for name, *_ in rows}) == 8
    assert sum(int(count) for _, count, *_ in rows) >= 20
    for name, _, lds, vgprs, spilled, scratch, _, verdict in rows:
        assert (spilled, scratch) == ("0", "0"), name
        assert int(lds.split("–")[-1].replace(",", "")) <= 65_536, name
        assert 0 < int(vgprs.split("–")[-1]) <= 256, name
        assert "compile" not in verdict, name


def test_the_page_has_the_rows_that_ship() -> None:
    page = (REPOSITORY / "docs" / "target-kernels.md").read_text()
    assert runpy.run_path(str(TOOL))["recipe_table"]() in page


def test_each_row_is_of_the_recipe_that_ships() -> None:
    for name, row in recipe_kernels().items():
        assert row.model == load_recipe(name).model
        assert row.configurations >= row.kernels > 0


@pytest.fixture
def a_row_that_fails(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Write a table in which the kernels of the tiny model's layers fail."""
    problem = {"model": str(tiny_model), "failing": 3, "problem": "out of registers"}
    row = asdict(next(iter(recipe_kernels().values()))) | problem
    with (tmp_path / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    monkeypatch.setattr(target_kernels, "FILE", tmp_path / "kernels.csv")
    recipe_kernels.cache_clear()
    yield
    recipe_kernels.cache_clear()


def test_layers_whose_kernels_fail_there_are_not_compiled(
    a_row_that_fails: None, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(train={"compile": "auto"}))
    figures = plan_figures(recipe, "strix-halo-128")
    assert not figures["choice"]["compiled"]
    (told,) = [line for line in figures["warnings"] if "do not compile for gfx1151" in line]
    assert "out of registers" in told
    elsewhere = Job.of(recipe, load_config(recipe), HOSTS["h200-141"])
    assert elsewhere.options.compiled


def test_doctor_names_recipes_whose_kernels_fail(a_row_that_fails: None, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    found = examine(GOOD[0].view(tmp_path / "host")).to_fix
    assert [(finding.check, finding.status) for finding in found] == [("kernels", "warn")]
    assert next(iter(recipe_kernels())) in found[0].saw
