"""Tasks of lm-eval on base and tuned: real ones, from files beside this one."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import WriteRecipe
from test_train import trained

from strixft.app.notebooks import run_stages
from strixft.evaluate.harness import LOGIT_BYTES, LONGEST, compare_tasks, load_tasks, rows_at_once
from strixft.evaluate.stage import check_evaluation, evaluate_recipe
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.errors import HostError, RecipeError

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """The tasks, with their data where the library looks for them."""
    for data in TASKS.glob("*.jsonl"):
        shutil.copy(data, tmp_path)
    return shutil.copytree(TASKS, tmp_path / "tasks")


def test_tasks_of_ones_own_count_base_and_tuned(
    write_recipe: WriteRecipe, tmp_path: Path, task_folder: Path
) -> None:
    asked = {"tasks": ["capitals", "counting"], "task_folder": "tasks", "task_rows": 3}
    run = open_run(write_recipe(evaluate=asked), tmp_path / "run")
    trained(run)
    evaluated = evaluate_recipe(run)
    rows = {(row["task"], row["metric"]): row for row in evaluated.figures["tasks"]}
    assert rows.keys() == {("capitals", "acc"), ("counting", "exact_match")}
    for row in rows.values():
        assert row["rows"] == 3
        assert row["change"]["change"] == pytest.approx(row["tuned"] - row["base"])
    html = evaluated._repr_html_()
    assert "lm-eval task" in html
    assert "capitals" in html


def test_an_unknown_task_is_told_before_the_first_stage(
    write_recipe: WriteRecipe, tmp_path: Path, task_folder: Path
) -> None:
    path = write_recipe(evaluate={"tasks": ["capitols"], "task_folder": "tasks"})
    run = open_run(path, tmp_path / "run")
    with pytest.raises(RecipeError, match="lm-eval has no task 'capitols'") as caught:
        run_stages(run, path, {})
    assert "did you mean 'capitals'?" in caught.value.fix
    assert not run.is_done("prepare")


def test_a_task_without_its_data_is_told(write_recipe: WriteRecipe, task_folder: Path) -> None:
    Path("capitals.jsonl").unlink()
    recipe = load_recipe(write_recipe(evaluate={"tasks": ["capitals"], "task_folder": "tasks"}))
    with pytest.raises(RecipeError, match=r"'capitals' cannot be loaded: .*capitals\.jsonl"):
        load_tasks(recipe)


def test_a_task_that_runs_generated_code_is_refused(
    write_recipe: WriteRecipe, task_folder: Path
) -> None:
    with (task_folder / "capitals.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    recipe = load_recipe(write_recipe(evaluate={"tasks": ["capitals"], "task_folder": "tasks"}))
    with pytest.raises(RecipeError, match="runs code that the model writes"):
        load_tasks(recipe)


def test_a_missing_package_says_what_to_type(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    recipe = load_recipe(write_recipe(evaluate={"tasks": ["arc_easy"]}))
    with pytest.raises(HostError, match="needs lm-eval") as caught:
        check_evaluation(recipe)
    assert caught.value.fix == "pip install 'strixft[eval]'"


def test_rows_at_once_keep_their_logits_in_the_plans_budget() -> None:
    row = LOGIT_BYTES * 1000 * LONGEST
    plan = {
        "host": {"budget_bytes": 100 + 5 * row},
        "phases": {"evaluate": {"device_bytes": 100}},
        "choice": {"evaluated_rows": 16},
    }
    assert rows_at_once(plan, 1000) == 5
    assert rows_at_once(plan, 1) == 16
    assert rows_at_once(plan, 100_000) == 1


def test_tasks_are_compared_pair_by_pair() -> None:
    base = {("t", "acc"): {0: 0.0, 1: 1.0, 2: 0.0}}
    tuned = {("t", "acc"): {2: 1.0, 1: 1.0, 0: 0.0}}
    (row,) = compare_tasks({"base": base, "tuned": tuned}, seed=0)
    assert (row["rows"], row["base"]) == (3, pytest.approx(1 / 3))
    assert row["change"]["low"] == 0
