"""A run takes another recipe as long as nothing that is done depends on the change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import WriteRecipe, chats, mark_as_trained, write_lines

from strixft.app.notebooks import run_stages
from strixft.prepare.stage import Prepared, prepare_recipe
from strixft.recipe.schema import Recipe
from strixft.run.folder import STAGES, Run
from strixft.run.manage import list_runs
from strixft.run.open import READ_BY, begin_again, find_runs, open_run
from strixft.support.errors import DataError, FitError, RecipeError, StageError
from strixft.train.stage import Trained


@pytest.fixture
def recipe(write_recipe: WriteRecipe) -> Path:
    """A recipe of twelve chats."""
    return write_recipe()


def test_every_section_of_a_recipe_has_its_first_reader() -> None:
    assert {*READ_BY, "offline", "notify"} - {"train.trackers"} == set(Recipe.model_fields)
    assert set(READ_BY.values()) <= {*STAGES, None}


def test_a_run_without_a_finished_stage_takes_a_corrected_recipe(
    recipe: Path, tmp_path: Path
) -> None:
    open_run(recipe, tmp_path / "run", {"dataset.max_length": 16})
    run = open_run(recipe, tmp_path / "run", {"dataset.max_length": 32})
    assert run.recipe.dataset.max_length == 32
    assert open_run(run.folder / "recipe.yaml", run.folder) == run


def test_what_was_prepared_stays_when_only_training_changes(recipe: Path, tmp_path: Path) -> None:
    prepared = prepare_recipe(open_run(recipe, tmp_path / "run"))
    run = open_run(recipe, tmp_path / "run", {"train.epochs": 7, "lora.r": 4})
    assert run.recipe.train.epochs == 7
    assert run.require(Prepared) == prepared


def test_a_change_that_something_done_depends_on_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    mark_as_trained(run.folder)
    with pytest.raises(RecipeError, match=r"dataset\.max_length") as caught:
        open_run(recipe, run.folder, {"dataset.max_length": 16})
    assert "--from prepare   repeats prepare and the later stages" in caught.value.fix
    assert open_run(recipe, run.folder) == run


def test_from_takes_the_change_and_sets_aside(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    changed = open_run(recipe, run.folder, {"dataset.max_length": 16}, first="prepare")
    assert changed.recipe.dataset.max_length == 16
    assert (run.folder / "prepare.1" / "result.json").is_file()
    assert not changed.is_done("prepare")


def test_from_a_later_stage_does_not_take_an_earlier_change(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    mark_as_trained(run.folder)
    with pytest.raises(RecipeError, match="belongs to a run of another recipe"):
        open_run(recipe, run.folder, {"dataset.max_length": 16}, first="plan")
    assert run.is_done("prepare")


def test_until_something_is_trained_settings_are_free(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    again = open_run(recipe, run.folder, {"dataset.max_length": 64})
    assert "dataset.max_length changed: prepare will be done again" in capsys.readouterr().err
    assert not again.is_done("prepare")
    assert (run.folder / "prepare.1" / "result.json").is_file()
    prepare_recipe(again)
    mark_as_trained(run.folder)
    with pytest.raises(RecipeError, match=r"dataset\.max_length"):
        open_run(recipe, run.folder)


def test_a_source_that_is_typed_starts_where_it_is_typed(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, here = write_recipe(), tmp_path / "elsewhere"
    here.mkdir()
    write_lines(here / "mine.jsonl", chats(3))
    monkeypatch.chdir(here)
    run = open_run(recipe, tmp_path / "run", {"dataset.source": "mine.jsonl"})
    assert run.recipe.dataset.source == str(here / "mine.jsonl")
    assert open_run(recipe, tmp_path / "other").recipe.dataset.source == f"{tmp_path}/tiny.jsonl"


def test_begin_again_names_the_first_stage() -> None:
    assert begin_again(["export.gguf", "train.epochs"]) == "--from plan"
    assert begin_again(["evaluate.max_rows", "export.to"]) == "--from evaluate"
    assert begin_again(["offline"]) == ""


def test_a_stage_refuses_a_recipe_that_was_changed_under_it(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    open_run(recipe, run.folder, {"train.epochs": 7})
    with pytest.raises(StageError, match=r"recipe\.yaml has changed since") as caught:
        prepare_recipe(run)
    assert caught.value.fix == "run the same command again"


def test_the_command_after_a_refusal_can_be_typed(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """A plan that does not fit names settings; with them the same run goes on."""
    recipe = write_recipe(memory={"reserve_gib": 10_000})
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(FitError) as caught:
        run_stages(run, recipe, {"evaluate.judge": None, "evaluate.pattern": "12"}, last="plan")
    command = caught.value.fix.rpartition("then: ")[2]
    assert command.startswith(f"strixft run {recipe} --run-dir {run.folder}")
    assert "--set evaluate.judge=null --set 'evaluate.pattern=\"12\"'" in command
    assert run.status()["state"] == "failed"


def test_rows_to_evaluate_on_are_missed_before_the_plan(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(dataset={"validation_fraction": 0})
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(DataError, match="no rows are held out") as caught:
        run_stages(run, recipe, {})
    more = "--set dataset.validation_fraction=0.05"
    assert caught.value.fix == (
        f"{more} --from prepare, or --to train   trains without an evaluation\n"
        f"     then: strixft run {recipe} --run-dir {run.folder} {more} --from prepare"
    )
    assert not run.is_done("plan")
    run_stages(run, recipe, {}, last="plan")
    assert run.is_done("plan")


def test_one_row_is_told_to_be_too_few(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(rows=chats(1))
    with pytest.raises(DataError, match="no rows are held out") as caught:
        run_stages(open_run(recipe, tmp_path / "run"), recipe, {})
    assert caught.value.fix.startswith("more rows, or --to train")


def test_a_damaged_recipe_hides_no_other_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    run = open_run(recipe, tmp_path / "runs" / "whole")
    bad = tmp_path / "runs" / "bad"
    bad.mkdir()
    (bad / "recipe.yaml").write_text("model: [")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert find_runs() == [run]
        assert [(row["run"], row["state"]) for row in list_runs()] == [
            ("bad", "unreadable"),
            ("whole", "new"),
        ]


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "{}", "{", "null"])
def test_a_damaged_status_is_told(tiny_run: Run, text: str) -> None:
    (tiny_run.folder / "status.json").write_text(text)
    assert tiny_run.status() == {"stage": None, "state": "unreadable"}


@pytest.mark.parametrize("name", ["rows.arrow", "order.npz"])
def test_rows_that_changed_since_are_not_read(tiny_run: Run, name: str) -> None:
    prepare_recipe(tiny_run)
    path = tiny_run.folder / "prepare" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StageError) as caught:
        tiny_run.require(Prepared)
    assert caught.value.problem == f"{path} has changed since stage prepare wrote it"
    assert caught.value.fix == (
        f"restore it, or: strixft run {tiny_run.folder}/recipe.yaml"
        f" --run-dir {tiny_run.folder} --from prepare"
    )
    path.unlink()
    with pytest.raises(StageError, match=f"{name} is missing: stage prepare wrote"):
        tiny_run.require(Prepared)


@pytest.mark.parametrize("key", ["inputs", "figures"])
def test_a_result_without_what_it_is_about_is_damaged(tiny_run: Run, key: str) -> None:
    prepare_recipe(tiny_run)
    path = tiny_run.folder / "prepare" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {}}))
    with pytest.raises(StageError, match=f"not a result of stage prepare: it has no {key}"):
        tiny_run.require(Prepared)


def test_the_adapter_is_among_what_later_stages_read() -> None:
    assert Trained.artefacts == ("adapter/*",)


def test_a_change_that_nothing_depends_on_is_taken(recipe: Path, tmp_path: Path) -> None:
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    assert open_run(recipe, run.folder, {"offline": True}).recipe.offline
    assert run.is_done("prepare")


def test_a_run_folder_may_be_a_number(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()  # the workspace
    run = open_run(recipe, 20261125)  # type: ignore[arg-type]  # papermill: -p run_dir 20261125
    assert run.folder == tmp_path / "20261125"


@pytest.mark.parametrize("given", [1e5, 2.1, True])
def test_a_run_folder_that_was_typed_otherwise_is_refused(recipe: Path, given: object) -> None:
    with pytest.raises(RecipeError, match=f"run_dir is {given!r}, which papermill") as caught:
        open_run(recipe, given)  # type: ignore[arg-type]
    assert caught.value.fix == "-r run_dir …   passes the text as it is typed"


def test_a_name_that_is_not_utf_8_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the name '.*/l\\udce4uf' is not UTF-8"):
        open_run(recipe, tmp_path / os.fsdecode(b"l\xe4uf"))
