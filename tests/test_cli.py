"""What is typed: exit codes, the text of errors, and one JSON document where one is asked for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import WriteRecipe, chat, chats, mark_as_trained

from strixft.app.cli import main
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe, explain
from strixft.run.manage import run_bytes
from strixft.run.open import open_run

ENTRY = "from strixft.app.cli import main; main()"


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


Type = Callable[..., Answer]


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Type:
    """Types a command through the entry point, in this process."""

    def enter_words(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["strixft", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, *capfd.readouterr())

    return enter_words


def type_in_a_shell(*words: object) -> Answer:
    """Types a command in a process of its own."""
    command = [sys.executable, "-c", ENTRY, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def refusal(answer: Answer, code: int) -> tuple[str, str]:
    """Problem and fix of a command that was refused."""
    assert (answer.code, answer.out) == (code, "")
    problem, fix = answer.err.rsplit("\nfix: ", 1)
    return problem, fix.removesuffix("\n")


# Bad data.


def test_a_data_file_that_is_missing(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(dataset={"source": "tinny.jsonl"})
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem == f"there is no data file {path.parent}/tinny.jsonl"
    assert fix == "did you mean 'tiny.jsonl'?, or your own: --set dataset.source=my-chats.jsonl"


def test_a_folder_without_data(enter: Type, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    problem, _ = refusal(enter("prepare", write_recipe(dataset={"source": "nothing"})), 2)
    assert str(tmp_path / "nothing") in problem


def test_a_data_file_that_is_empty(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(rows=[])
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem == f"{path.with_suffix('.jsonl')} is empty (0 bytes)"
    assert fix == "name a file with rows in it"


def test_a_line_that_is_not_json(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(rows=[*chats(3), "{not json}"])
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem == (
        f"1 of 4 rows of {path.with_suffix('.jsonl')} cannot be used:\n"
        "  tiny.jsonl, row 4: is not JSON: Expecting property name enclosed in double quotes:"
        " line 1 column 2 (char 1)"
    )
    assert fix == ("correct these rows, or leave them out: --set dataset.max_bad_fraction=0.25")


def test_a_row_without_messages(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(rows=[*chats(2), {"messages": []}, *chats(1)])
    problem, _ = refusal(enter("prepare", path), 2)
    assert "\n  tiny.jsonl, row 3: the row has no 'messages' list" in problem


def test_an_unknown_role(enter: Type, write_recipe: WriteRecipe) -> None:
    row = chat("a", "b")
    row["messages"][0]["role"] = "robot"
    path = write_recipe(rows=[row, *chats(3)])
    problem, _ = refusal(enter("prepare", path), 2)
    assert "\n  tiny.jsonl, row 1: message 1 has the role 'robot'; known are system," in problem


def test_half_a_character(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(rows=[*chats(3), chat("a", "\ud83d")])
    problem, _ = refusal(enter("prepare", path), 2)
    assert "\n  tiny.jsonl, row 4: content of message 2 has half a character at place 0" in problem


def test_columns_of_no_format(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(rows=[{"first": "a", "second": "b"}])
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem == (
        f"{path.with_suffix('.jsonl')}, row 1: no format has the columns 'first', 'second'"
    )
    assert fix.startswith("--set 'dataset.columns={")


# Bad recipes.


def test_an_unknown_model(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(model="nobody/nothing", offline=True)
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem.startswith("model 'nobody/nothing' cannot be loaded: ")
    assert fix == (
        "model: a folder with config.json, a hub id (is the network there? is it gated:"
        " hf auth login), or embedded:smollm2-135m"
    )


def test_a_misspelt_setting_in_the_file(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(train={"learning_rat": 1e-4})
    problem, fix = refusal(enter("prepare", path), 2)
    assert problem == (
        f"{path} has 1 fault:\n"
        "  train.learning_rat: there is no such setting; did you mean 'learning_rate'?"
    )
    assert fix == "strixft recipe --explain   shows every setting"


def test_a_misspelt_setting_on_the_command_line(enter: Type) -> None:
    problem, _ = refusal(enter("recipe", "demo", "--set", "train.learning_rat=1e-4"), 2)
    assert problem.endswith(
        "\n  train.learning_rat: there is no such setting; did you mean 'learning_rate'?"
    )


@pytest.mark.parametrize("setting", ["train..seed=1", ".=1", "train.=1"])
def test_a_setting_with_an_empty_part(enter: Type, setting: str) -> None:
    problem, fix = refusal(enter("recipe", "demo", "--set", setting), 2)
    assert problem == f"{setting.partition('=')[0]!r} is not a dotted key"
    assert fix == "--set train.learning_rate=2e-4"


def test_a_setting_without_a_value(enter: Type) -> None:
    problem, fix = refusal(enter("recipe", "demo", "--set", "train.seed"), 2)
    assert problem == "--set 'train.seed' has no key or no '='"
    assert fix == "--set train.learning_rate=2e-4"


@pytest.mark.parametrize("command", ["recipe", "prepare", "plan", "train", "evaluate", "run"])
def test_an_unknown_recipe(enter: Type, command: str) -> None:
    problem, fix = refusal(enter(command, "dmeo"), 2)
    assert problem == f"there is no recipe 'dmeo' (looked from {Path.cwd()})"
    assert fix == "did you mean 'demo'?   strixft recipe   lists them"


def test_an_unknown_host(enter: Type, write_recipe: WriteRecipe) -> None:
    problem, fix = refusal(enter("plan", write_recipe(), "--host", "h100"), 2)
    assert problem == "there is no host 'h100'"
    assert fix == "did you mean 'h100-80'?"
    _, fix = refusal(enter("plan", write_recipe(), "--host", "cpu (x86_64)"), 2)
    assert fix.startswith("choose one of: auto, cpu, strix-halo-128, ")


# Runs.


def test_a_run_name_that_is_taken(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    assert enter("prepare", path, "--run-dir", "taken").code == 0
    mark_as_trained(Path("taken"))
    answer = enter("prepare", path, "--run-dir", "taken", "--set", "dataset.max_length=64")
    problem, fix = refusal(answer, 2)
    assert problem == (
        f"{Path.cwd()}/taken belongs to a run of another recipe; these keys differ:\n"
        "  dataset.max_length: 256 there, 64 here"
    )
    assert fix == (
        f"--run-dir {Path.cwd()}/taken-2   for a new run; or, with strixft run,"
        " --from prepare   repeats prepare and the later stages"
    )


def test_a_run_folder_is_relative_to_where_it_is_typed(
    enter: Type, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert enter("prepare", path, "--run-dir", "here").code == 0
    assert (tmp_path / "deep" / "here" / "prepare" / "result.json").is_file()


@pytest.mark.parametrize("option", ["--from", "--to"])
def test_an_unknown_stage(enter: Type, write_recipe: WriteRecipe, option: str) -> None:
    answer = enter("run", write_recipe(), option, "trian")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.endswith("there is no stage 'trian'\nfix: did you mean 'train'?\n")


def test_stages_in_the_wrong_order(enter: Type, write_recipe: WriteRecipe) -> None:
    answer = enter("run", write_recipe(), "--from", "train", "--to", "plan")
    assert answer.code == 1
    assert answer.err.endswith("train comes after plan\nfix: --from plan --to train\n")


def test_an_unknown_run(enter: Type) -> None:
    problem, fix = refusal(enter("report", "nothing"), 1)
    assert problem == "there is no run 'nothing'"
    assert fix == "strixft runs   lists the runs"


# Plans.


def test_the_plan_of_a_run_that_does_not_fit_is_printed(
    enter: Type, write_recipe: WriteRecipe
) -> None:
    path = write_recipe(lora={"r": 10_000_000})
    answer = enter("plan", path, "--host", "strix-halo-64", "--json")
    figures = json.loads(answer.out)
    assert answer.code == 3
    assert figures["fits"] is False
    assert figures["peak_bytes"] > figures["host"]["budget_bytes"]
    assert len(figures["advice"]) >= 3
    assert all(row["peak_bytes"] for row in figures["advice"])


def test_the_plan_of_a_run_that_fits_is_printed(enter: Type, write_recipe: WriteRecipe) -> None:
    answer = enter("plan", write_recipe(), "--host", "strix-halo-64", "--json")
    figures = json.loads(answer.out)
    assert (answer.code, figures["fits"]) == (0, True)


def test_a_plan_writes_nothing(enter: Type, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = write_recipe()
    before = sorted(tmp_path.rglob("*"))
    enter("plan", path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reserve_that_leaves_nothing(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(memory={"reserve_gib": 62})
    problem, fix = refusal(enter("plan", path, "--host", "strix-halo-64", "--json"), 3)
    assert problem.startswith("strix-halo-64 has nothing left for a run: 0.00 GiB by ")
    assert fix == "close other programs, or --set memory.reserve_gib=15.5"


# JSON.


def test_json_of_the_recipes(enter: Type) -> None:
    answer = enter("recipe", "--json")
    assert Path(json.loads(answer.out)["demo"]).is_file()
    assert (answer.code, answer.err) == (0, "")


def test_json_of_one_recipe(enter: Type) -> None:
    answer = enter("recipe", "demo", "--set", "train.seed=7", "--json")
    recipe = load_recipe("demo", {"train.seed": 7})
    assert json.loads(answer.out) == recipe.to_dict()


def test_json_of_the_explanations(enter: Type) -> None:
    answer = enter("recipe", "--explain", "--json")
    assert json.loads(answer.out) == [list(row) for row in explain()]


def test_the_schema_is_json_without_being_asked_for(enter: Type) -> None:
    assert json.loads(enter("recipe", "--schema").out) == Recipe.model_json_schema()


def test_json_of_a_stage_is_all_that_is_printed(enter: Type, write_recipe: WriteRecipe) -> None:
    answer = enter("train", write_recipe(), "--run-dir", "run", "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == json.loads(Path("run/train/result.json").read_text())


def test_json_of_the_runs(enter: Type, write_recipe: WriteRecipe) -> None:
    run = open_run(write_recipe())
    row: dict[str, Any] = {"run": "tiny", "stage": None, "state": "new", "note": ""}
    row |= {"model": run.recipe.model, "folder": str(run.folder), "bytes": run_bytes(run.folder)}
    assert json.loads(enter("runs", "--json").out) == [row]


def test_json_of_a_report(enter: Type, write_recipe: WriteRecipe) -> None:
    folder = open_run(write_recipe()).folder
    answer = enter("report", "tiny", "--json")
    assert json.loads(answer.out) == {"report": f"{folder}/report.html"}


def test_json_of_a_run_is_all_that_is_printed(enter: Type, write_recipe: WriteRecipe) -> None:
    answer = enter("run", write_recipe(), "--run-dir", "run", "--to", "prepare", "--json")
    assert answer.code == 0
    summary = json.loads(answer.out)
    assert summary["run_dir"] == str(Path("run").absolute())
    assert list(summary["stages"]) == ["prepare"]


# Tables for people.


def test_every_setting_is_explained_and_fits_a_pager(enter: Type) -> None:
    out = enter("recipe", "--explain").out
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.split(" = ")[0] for line in lines] == [key for key, *_ in explain()]
    texts = [line for line in out.splitlines() if line.startswith(" ")]
    assert max(map(len, texts)) <= 100


def test_no_help_is_cut(enter: Type) -> None:
    for words in (["--help"], ["bench", "--help"]):
        out = enter(*words).out
        assert "…" not in out
        assert "..." not in out.replace("COMMAND [ARGS]...", "")


def test_a_recipe_is_shown_as_yaml_that_can_be_used(enter: Type, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(enter("recipe", "demo").out)
    assert load_recipe(path) == load_recipe("demo")


def test_a_name_with_brackets_is_shown_as_it_is(enter: Type, write_recipe: WriteRecipe) -> None:
    open_run(write_recipe(), "runs/[bold]:x:")
    assert enter("runs").out.splitlines()[1].split()[0] == "[bold]:x:"


def test_a_line_of_a_table_is_not_folded_in_a_pipe(enter: Type, write_recipe: WriteRecipe) -> None:
    open_run(write_recipe(), f"runs/{'long' * 50}")
    assert enter("runs").out.splitlines()[1].split()[0] == "long" * 50


def test_a_list_of_no_runs_is_a_header_alone(enter: Type) -> None:
    header = ["run", "model", "stage", "state", "done", "loss,", "base", "→", "tuned"]
    assert enter("runs").out.split() == [*header, "size", "updated"]


# Tracebacks.


def test_an_error_has_no_traceback(enter: Type) -> None:
    assert "Traceback" not in enter("recipe", "dmeo").err


def test_debug_shows_a_traceback_and_keeps_text_and_code(enter: Type) -> None:
    answer = enter("recipe", "dmeo", "--debug")
    assert answer.code == 2
    assert answer.err.startswith("Traceback (most recent call last):")
    assert answer.err.endswith("\nfix: did you mean 'demo'?   strixft recipe   lists them\n")


def test_debug_does_not_last(enter: Type) -> None:
    enter("recipe", "dmeo", "--debug")
    assert "Traceback" not in enter("recipe", "dmeo").err


def test_a_file_that_cannot_be_read(enter: Type, write_recipe: WriteRecipe) -> None:
    path = write_recipe(dataset={"source": "/proc/self/mem", "format": "messages"})
    problem, _ = refusal(enter("prepare", path), 2)
    assert problem.endswith("/mem cannot be read: Input/output error")


# A shell of its own.


def loaded_modules(*words: str) -> set[str]:
    """Modules that a command has imported when it ends."""
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    command = [sys.executable, "-c", report + ENTRY, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["bench", "--help"],
        ["recipe"],
        ["recipe", "demo"],
        ["recipe", "--schema"],
    ],
    ids=" ".join,
)
def test_help_and_recipes_start_without_torch(words: list[str]) -> None:
    modules = loaded_modules(*words)
    assert "strixft.app.cli" in modules
    assert not modules & {"torch", "transformers", "datasets", "papermill", "matplotlib"}


def test_a_shell_sees_the_exit_code_and_two_lines() -> None:
    answer = type_in_a_shell("recipe", "dmeo")
    assert answer == Answer(
        2,
        "",
        f"there is no recipe 'dmeo' (looked from {Path.cwd()})\n"
        "fix: did you mean 'demo'?   strixft recipe   lists them\n",
    )


def test_the_installed_command_is_the_entry_point() -> None:
    command = Path(sys.executable).with_name("strixft")
    done = subprocess.run([command, "recipe", "--json"], capture_output=True, check=True)
    assert "demo" in json.loads(done.stdout)


def test_an_unknown_option_is_refused(enter: Type) -> None:
    answer = enter("recipe", "--jsn")
    assert answer.code == 2
    assert "No such option: --jsn" in answer.err


@pytest.mark.parametrize("words", [("mkl",), ("lab", "--no-browser"), ("plan", "demo")])
def test_a_cache_that_is_a_file(
    enter: Type, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "file"))
    answer = enter(*words)
    problem = f"the cache {tmp_path / 'file'} is not a folder: {tmp_path / 'file'} is a file"
    assert answer.code == 1
    assert answer.err.splitlines()[-2:] == [
        problem,
        "fix: export STRIXFT_CACHE=…   with a folder that can be written",
    ]


def test_a_page_whose_name_is_a_folder(enter: Type, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    problem, fix = refusal(enter("bench", "published", "--page", "folder"), 1)
    assert problem == "folder is a folder"
    assert fix == "--page folder/page.html"


def test_a_page_over_a_file_of_the_user(enter: Type, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    problem, fix = refusal(enter("bench", "published", "--page", "mine.html"), 1)
    assert problem == "mine.html exists and is not a page of strixft"
    assert fix == "--page mine-2.html"
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_pipe_that_closes_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", ENTRY, "recipe", "--schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "strixft failed" not in done.stderr


HOSTS = {
    "locale without letters": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII terminal": {"PYTHONIOENCODING": "ascii", "TERM": "dumb"},
}


@pytest.mark.parametrize("host", HOSTS)
def test_names_hold_any_letters_under_any_locale(
    host: str, monkeypatch: pytest.MonkeyPatch, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    for name, value in HOSTS[host].items():
        monkeypatch.setenv(name, value)
    path = write_recipe("Lauf ü – 1", rows=[chat("Größe?", f"Größe {n} ✓") for n in range(9)])
    answer = type_in_a_shell("prepare", path, "--run-dir", tmp_path / "Läufe")
    assert answer.code == 0, answer.err
    row = json.loads(type_in_a_shell("recipe", path, "--json").out)
    assert row["dataset"]["source"].endswith("/Lauf ü – 1.jsonl")
    problem, _ = refusal(type_in_a_shell("recipe", tmp_path / "Größe"), 2)
    assert "Traceback" not in problem
    assert "there is no recipe" in problem


def test_what_to_type_can_be_typed(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    name = "-x {b} 100%s q'u\"o$HOME`x`#"
    path = write_recipe(rows=[*chats(3), "{broken"])
    path = path.rename(tmp_path / f"{name}.yaml")
    folder = tmp_path / "runs" / name
    _, fix = refusal(type_in_a_shell("run", path, "--run-dir", folder, "--json"), 2)
    command = fix.rpartition("then: ")[2]
    assert shlex.split(command) == ["strixft", "run", str(path), "--run-dir", str(folder)]
