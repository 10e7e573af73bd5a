"""The stages as notebooks: the same result three ways, resume, and failures that help."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import REPOSITORY, WriteRecipe, chats, write_lines
from test_train import trained

from strixft.app.notebooks import notebook_of, run_notebook, run_stages
from strixft.recipe.load import parse_override
from strixft.run.folder import STAGES, Result, Run, chosen_stages
from strixft.run.open import open_run
from strixft.support.errors import DataError, StageError

RUN = [sys.executable, "-m", "strixft", "run"]


def losses(folder: Path) -> list[float]:
    result = Result.load(folder / "train")
    assert result is not None
    found: list[float] = result.figures["losses"]
    return found


@pytest.fixture(scope="module")
def done(
    write_module_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Run]:
    """A recipe and its run, all stages through notebooks."""
    recipe = write_module_recipe("done")
    run = open_run(recipe, tmp_path_factory.mktemp("runs") / "run")
    run_stages(run, recipe, {})
    return recipe, run


def test_the_three_ways_give_the_same_losses(done: tuple[Path, Run], tmp_path: Path) -> None:
    recipe, run = done
    for stage in ("prepare", "plan", "train"):
        if stage == "train":
            shutil.copytree(tmp_path / "papermill", tmp_path / "by-hand")
            by_hand(notebook_of(stage), recipe, tmp_path / "by-hand")
        papermill.execute_notebook(
            str(notebook_of(stage)),
            str(tmp_path / "out.ipynb"),
            parameters={"recipe": str(recipe), "run_dir": str(tmp_path / "papermill")},
            progress_bar=False,
        )
    assert losses(run.folder) == losses(tmp_path / "papermill") == losses(tmp_path / "by-hand")
    assert len(list(run.folder.glob("*/*.ipynb"))) == len(STAGES) - 1  # export is not asked for


def by_hand(notebook: Path, recipe: Path, run_dir: Path) -> None:
    """Run a notebook with its own parameters cell edited, as a person would."""
    from nbclient import NotebookClient

    page = nbformat.read(notebook, as_version=4)
    cell = next(cell for cell in page.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source = f"recipe, run_dir, overrides = {str(recipe)!r}, {str(run_dir)!r}, {{}}"
    NotebookClient(page, resources={"metadata": {"path": str(notebook.parent)}}).execute()


def test_what_is_done_is_skipped(done: tuple[Path, Run]) -> None:
    recipe, run = done
    told: list[tuple[str, bool]] = []
    run_stages(run, recipe, {}, notify=lambda *row: told.append(row))
    assert told == [(stage, True) for stage in ("prepare", "plan", "train", "evaluate")]


def test_from_sets_aside_and_does_again(done: tuple[Path, Run]) -> None:
    recipe, run = done
    run_stages(run, recipe, {}, first="evaluate")
    assert (run.folder / "evaluate.1" / "result.json").is_file()
    assert run.is_done("evaluate")


def test_an_error_of_ours_survives_the_notebook(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(rows=[*chats(3), "{broken"])
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(DataError, match="row 4: is not JSON") as caught:
        run_stages(run, recipe, {})
    assert f"then: strixft run {recipe} --run-dir {run.folder}" in caught.value.fix
    kept = nbformat.read(run.folder / "prepare" / "10-prepare.ipynb", as_version=4)
    assert any(out.output_type == "error" for c in kept.cells for out in c.get("outputs", ()))


def test_settings_of_a_fix_are_in_the_command_that_goes_on(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(rows=[{**row, "images": ["a.png"]} for row in chats(9)])
    run = open_run(recipe, tmp_path / "run")
    overrides = {"dataset.ignore": [], "evaluate.pattern": "12"}
    with pytest.raises(DataError, match="has 'images'") as caught:
        run_stages(run, recipe, overrides, last="prepare")
    assert caught.value.settings == {"dataset.ignore": ["images"]}
    words = shlex.split(caught.value.fix.rpartition("then: ")[2])
    assert words[2:5] == [str(recipe), "--run-dir", str(run.folder)]
    assert "--set" in words
    overrides = dict(parse_override(text) for text in words[6::2])
    assert overrides == {"evaluate.pattern": "12", "dataset.ignore": ["images"]}
    run_stages(open_run(recipe, run.folder, overrides), recipe, overrides, last="prepare")
    assert run.is_done("prepare")


def test_a_failed_run_goes_on_when_its_cause_is_gone(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(rows=[*chats(6), "{broken"])
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(DataError):
        run_stages(run, recipe, {}, last="prepare")
    write_lines(tmp_path / "tiny.jsonl", chats(6))
    run_stages(open_run(recipe, run.folder), recipe, {}, last="prepare")
    assert run.is_done("prepare")


def test_a_parameter_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"10-prepare\.ipynb has no parameter 'recipee'") as caught:
        run_notebook(notebook_of("prepare"), tmp_path / "out.ipynb", {"recipee": "demo"})
    assert caught.value.fix == "did you mean 'recipe'?"
    assert not (tmp_path / "out.ipynb").exists()


def test_a_cell_that_fails_is_named(tmp_path: Path) -> None:
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(page, tmp_path / "in.ipynb")
    with pytest.raises(StageError, match=r"stopped at In \[1\]: ZeroDivisionError"):
        run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {})


def test_nothing_that_lies_about_changes_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("own = 1\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "datasets.py").write_text("1 / 0\n")  # the working folder
    code = ["import sys, datasets", "print(sys.executable, 'own' in globals())"]
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in code])
    folder = tmp_path / "a {run} 100%"
    folder.mkdir()
    nbformat.write(page, folder / "in {x}.ipynb")
    run_notebook(folder / "in {x}.ipynb", folder / "out {}.ipynb", {})
    kept = nbformat.read(folder / "out {}.ipynb", as_version=4)
    assert kept.cells[1].outputs[0].text == f"{sys.executable} False\n"


def test_stages_are_chosen_by_name() -> None:
    assert chosen_stages("plan", "train") == ("plan", "train")
    assert chosen_stages(None, None) == STAGES
    with pytest.raises(StageError, match="there is no stage 'trian'") as caught:
        chosen_stages("trian", None)
    assert caught.value.fix == "did you mean 'train'?"
    with pytest.raises(StageError, match="train comes after plan"):
        chosen_stages("train", "plan")


def test_a_killed_run_is_finished_by_the_next_call(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """SIGKILL to the command while its kernel trains; then the same command again."""
    train = {"epochs": 5, "save_every_minutes": 0.001}
    recipe, folder = write_recipe(train=train), tmp_path / "run"
    child = subprocess.Popen([*RUN, recipe, "--run-dir", folder], cwd=REPOSITORY)
    deadline = time.monotonic() + 180
    while not is_training(folder):
        assert child.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    subprocess.run([*RUN, recipe, "--run-dir", folder], check=True, cwd=REPOSITORY)
    assert Run(folder, open_run(recipe, folder).recipe).is_done("evaluate")
    undisturbed = open_run(recipe, tmp_path / "undisturbed")
    trained(undisturbed)
    assert losses(folder) == pytest.approx(losses(undisturbed.folder), rel=1e-6)


def is_training(folder: Path) -> bool:
    status = folder / "status.json"
    if not status.is_file():
        return False
    return bool(json.loads(status.read_text()).get("progress", {}).get("done"))
