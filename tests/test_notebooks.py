"""Notebooks stay thin, carry no outputs, and have the parameters that the pipeline passes."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import REPOSITORY

from strixft.app.notebooks import notebook_of
from strixft.run.folder import STAGES

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook_for_every_stage() -> None:
    assert [notebook_of(stage) for stage in STAGES] == sorted(map(notebook_of, STAGES))
    assert len(NOTEBOOKS) >= len(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert len(code) < 10
    for cell in code:
        assert not cell.outputs
        assert cell.execution_count is None
        banned = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While)
        assert not [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, banned)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_parameters(stage: str) -> None:
    assert set(papermill.inspect_notebook(str(notebook_of(stage)))) == {
        "recipe",
        "run_dir",
        "overrides",
    }


def test_papermill_cannot_mistype_a_parameter(tmp_path: Path) -> None:
    """papermill itself warns only, and would run the demo."""
    words = ["recipee", "recipes/mine.yaml", "-p", "run_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "papermill", str(notebook_of("prepare"))]
    done = subprocess.run(
        [*command, str(tmp_path / "out.ipynb"), "-p", *words], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the notebook has no parameter 'recipee'" in done.stderr
    assert "did you mean 'recipe'?" in done.stderr
    assert not (tmp_path / "run").exists()
