"""The form without a browser: the widgets are moved as a person would, and real stages run."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WriteRecipe, chats, recipe_writer, write_lines

from strixft.app import choices as choosing
from strixft.app.background import Latest
from strixft.app.choices import Choices, keep_upload, offers
from strixft.app.form import Form, start
from strixft.app.form_parts import ON_HUB, PICK, UPLOAD, ModelSection
from strixft.catalog.recipe_figures import recipe_figures
from strixft.formats.sources import data_files
from strixft.recipe.find import find_recipes
from strixft.recipe.load import load_recipe
from strixft.run.open import find_run
from strixft.support.errors import DataError, RecipeError, StageError
from strixft.support.units import GIB

PATIENCE_S = 240


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Path:
    """The working folder, with recipes and a demo on the tiny model."""
    (tmp_path / "recipes").mkdir()
    recipe_writer(tmp_path / "recipes", tiny_model)("demo", rows=chats(20), train={"epochs": 2})
    return tmp_path


@pytest.fixture
def form(workspace: Path) -> Iterator[Form]:
    """A form for a new run; its data are read and it is planned."""
    found = Form(Choices("recipes/demo.yaml"), None)
    yield found
    found.wait()  # else its thread would go on in the next test's folder


# what was chosen


def test_every_recipe_has_figures_and_an_offer() -> None:
    shipped = {path.stem for path in find_recipes().values()}
    assert set(recipe_figures()) == shipped - {"demo"}
    assert {one.recipe for one in offers()} == shipped
    assert offers()[0].recipe == "demo"


def test_an_offer_says_whether_it_fits() -> None:
    large = next(one for one in offers() if one.recipe == "llama-3.3-70b-qlora")
    assert " · fits" in large.label(109 * GIB)
    assert "does not fit" in large.label(16 * GIB)
    assert "fit" not in large.label(None)
    name, needs, takes = large.label(109 * GIB).splitlines()
    assert name == "Llama-3.3-70B-Instruct"
    assert needs.startswith("qlora · ")
    assert "GB to get" in takes


def test_the_figures_are_those_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    for name, one in recipe_figures().items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {one.tok_per_s:,.0f} |" in line
        assert one.least_bytes <= one.need_bytes


def test_the_command_gives_the_same_recipe(workspace: Path) -> None:
    data = write_lines(workspace / "it's mine.jsonl", chats(3))
    chosen = Choices("recipes/demo.yaml", {"dataset.source": str(data), "lora.r": 8})
    command = chosen.command("mine")
    assert command.startswith("strixft run recipes/demo.yaml --run-dir runs/mine --set ")
    assert "--set lora.r=8" in command
    import shlex

    words = shlex.split(command)
    from strixft.recipe.load import parse_override

    given = dict(parse_override(word) for word in words if "=" in word)
    assert load_recipe(words[2], given) == chosen.load()


def test_a_saved_recipe_runs_from_anywhere_and_is_never_overwritten(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Choices("recipes/demo.yaml", {"method": "qlora"})
    first, second = chosen.save("mine"), chosen.save("mine")
    assert first == workspace / "recipes/mine.yaml"
    assert second == workspace / "recipes/mine-2.yaml"
    wanted = chosen.load()
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    assert load_recipe(first) == wanted
    assert "evaluate" not in yaml.safe_load(first.read_text()), "only what differs is written"


def test_a_name_is_free_and_plain(workspace: Path) -> None:
    chosen = Choices("recipes/demo.yaml", {"dataset.source": "/x/my <b>chats</b>.jsonl"})
    assert chosen.name() == "demo-b-.jsonl" or chosen.name().replace("-", "").isalnum()
    (workspace / "runs/demo").mkdir(parents=True)
    assert Choices("recipes/demo.yaml").name() == "demo-2"
    with pytest.raises(StageError, match="is not a name for a run"):
        Choices("recipes/demo.yaml").begin("../x", None)
    with pytest.raises(RecipeError, match="exists"):
        Choices("recipes/demo.yaml").begin("demo", None)


def test_an_upload_is_kept_once_under_a_plain_name(workspace: Path) -> None:
    first = keep_upload("../../<img src=x>.jsonl", b"{}")
    assert first.parent == workspace / "data"
    assert first.read_bytes() == b"{}"
    assert keep_upload("../../<img src=x>.jsonl", memoryview(b"{}")) == first
    other = keep_upload("../../<img src=x>.jsonl", b"[]")
    assert other != first
    assert first.read_bytes() == b"{}"
    with pytest.raises(DataError, match="is empty"):
        keep_upload("a.jsonl", b"")


def test_an_upload_that_cannot_be_written_says_why(workspace: Path) -> None:
    (workspace / "data").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        keep_upload("a.jsonl", b"{}")


@pytest.mark.parametrize("name", ["データ" * 60 + ".jsonl", "x" * 300 + ".jsonl.gz", "..", "/"])
def test_an_upload_of_any_name_is_kept_as_a_data_file(workspace: Path, name: str) -> None:
    """open-webui/open-webui#25954, gradio-app/gradio#9912: a name has 255 bytes, not letters."""
    kept = [keep_upload(name, content) for content in (b"{}", b"[]")]
    assert [path.read_bytes() for path in kept] == [b"{}", b"[]"]
    assert set(data_files(workspace)) >= set(kept)


def test_an_upload_that_does_not_fit_leaves_nothing(workspace: Path) -> None:
    """OSC/ondemand#260: a part of a file stayed, under the name of the whole one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError, match="cannot be written: File too large"):
            keep_upload("a.jsonl", b"{}" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((workspace / "data").iterdir()) == []


def test_only_data_files_are_picked(workspace: Path) -> None:
    wanted = [workspace / name for name in ("a.jsonl", "deep/b.csv", "c.parquet", "d.jsonl.zst")]
    others = (
        *("recipes/x.yaml", "picture.png", "requirements.txt", "notes.md", ".hidden/h.jsonl"),
        *("env/lib/x.json", "runs/r/status.json", "node_modules/p.json"),
    )
    for path in [*wanted, *(workspace / name for name in others)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (workspace / "env/pyvenv.cfg").touch()
    found = set(data_files(workspace))
    assert set(wanted) <= found
    assert {path.name for path in found - set(wanted)} == {"demo.jsonl"}


def test_the_newest_job_is_done_and_older_ones_are_dropped() -> None:
    latest, done, told = Latest(), [], []

    def job(name: str) -> Callable[[Callable[[], bool]], None]:
        def work(is_outdated: Callable[[], bool]) -> None:
            wait_for(lambda: name != "first" or is_outdated())
            told.append(is_outdated())
            done.append(name)

        return work

    latest.do(job("first"))
    wait_for(lambda: latest.is_outdated() is False)
    for name in ("second", "third"):
        latest.do(job(name))
    assert latest.wait(PATIENCE_S)
    assert done[0] == "first"
    assert done[-1] == "third"
    assert told[0] is True


# the form itself


def test_data_are_read_planned_and_started(form: Form, workspace: Path) -> None:
    data = write_lines(workspace / "<i>mine.jsonl", chats(30))
    form.data.kind.value = PICK
    label = next(label for label, value in form.data.files.options if value == str(data))
    assert label.startswith("<i>mine.jsonl"), "a list shows text, not HTML"
    form.data.files.value = str(data)
    wait_for(lambda: "30" in form.data.report.value or form.data.problem.value)
    assert form.data.problem.value == ""
    wait_for(lambda: not form.start.disabled)
    assert "Fits: " in form.settings.bar.value
    assert str(data).replace("<", "&lt;").replace(">", "&gt;") in form.command.value
    form.settings.rank.value = 8
    assert "about " in form.settings.bar.value, "the first answer is there at once"
    form.settings.wait()
    assert "about " not in form.settings.bar.value
    form.name.value = "mine"
    form.start.click()
    wait_for(lambda: form.begun.layout.display != "none" or "sx-card" in form.said.value)
    run = find_run("mine")
    assert run.recipe.lora.r == 8
    assert run.recipe.dataset.source == str(data)
    assert run.is_done("prepare"), "what was read to look at it is used"
    assert not list((workspace / choosing.DRAFTS).glob("*/recipe.yaml"))
    wait_for(lambda: run.is_done("evaluate"))
    wait_for(lambda: any("<iframe" in getattr(one, "value", "") for one in _below(form.begun)))
    again = start_again()
    assert again.runs.value == "mine"
    assert again.choosing.layout.display == "none"
    assert "rank" in again.summary.value


def start_again() -> Form:
    from strixft.app.form import shown_first

    return Form(Choices("recipes/demo.yaml"), shown_first(None))


def _below(box: Any) -> Iterator[Any]:
    for child in getattr(box, "children", ()):
        yield child
        yield from _below(child)


def test_a_file_that_holds_no_data_is_a_card(form: Form, workspace: Path) -> None:
    wait_for(lambda: form.data.report.value)
    form.data.kind.value = UPLOAD
    picture = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
    form.data.upload.value = ({**_file("<b>cat.jsonl"), "content": memoryview(picture)},)
    wait_for(lambda: form.data.problem.value)
    assert 'class="sx-card' in form.data.problem.value
    assert "<b>cat" not in form.data.problem.value
    assert form.start.disabled


def test_what_an_error_proposes_is_set_by_a_button(form: Form, workspace: Path) -> None:
    wait_for(lambda: form.data.report.value)
    assert form.data.mend.layout.display == "none"
    path = write_lines(workspace / "faulty.jsonl", chats(40))
    path.write_text(path.read_text() + '{"messages": []}\n')
    form.data.kind.value = PICK
    form.data.files.value = str(path)
    wait_for(lambda: form.data.problem.value)
    assert form.data.mend.layout.display == ""
    assert form.data.mend.description == "Set dataset.max_bad_fraction = 0.03 and read them again"
    form.data.mend.click()
    wait_for(lambda: "rows to train" in form.data.report.value)
    assert form.data.mend.layout.display == "none"
    assert form.choices.overrides["dataset.max_bad_fraction"] == 0.03


def _file(name: str) -> dict[str, Any]:
    from datetime import UTC, datetime

    when = datetime(2026, 11, 30, tzinfo=UTC)
    return {"name": name, "type": "", "size": 1, "last_modified": when, "error": ""}


def test_a_file_that_is_too_large_for_the_browser_says_where_to_put_it(form: Form) -> None:
    form.data.upload.error = "NotReadableError"
    assert "into the folder data" in form.data.problem.value


def test_a_name_that_is_refused_can_be_mended(form: Form, workspace: Path) -> None:
    """cocktailpeanut/fluxgym#263: after an error nothing could be started any more."""
    wait_for(lambda: not form.start.disabled)
    form.name.value = "a/b"
    form.start.click()
    assert "is not a name for a run" in form.said.value
    assert not form.start.disabled
    begun = list[str]()
    form._start_on = lambda run: begun.append(run.name)  # type: ignore[method-assign]
    form.name.value = "a-b"
    form.start.click()
    form.start.click()
    assert "is not a name" not in form.said.value
    wait_for(lambda: begun)
    assert begun == ["a-b"]


def test_using_settings_puts_them_into_the_recipe(form: Form) -> None:
    wait_for(lambda: not form.start.disabled)
    assert form.settings.use_button.disabled
    form.settings.epochs.value = 3
    assert not form.settings.use_button.disabled
    form.settings.use_button.click()
    assert form.choices.overrides["train.epochs"] == 3
    assert "train.epochs=3" in form.command.value
    assert "epochs: 3" in form.yaml.value
    form.settings.wait()
    form.settings.method.value = "full"
    assert form.settings.rank.disabled
    form.settings.wait()
    form.settings.reset.click()
    assert form.settings.method.value == "lora"


def test_another_model_begins_with_defaults(form: Form) -> None:
    form.models.other.value = "owner/<b>model"
    form.models.take.click()
    assert form.choices.overrides["model"] == "owner/<b>model"
    assert "<b>model" not in form.models.about.value + form.models.login_text.value
    assert form.models.login.layout.display == ""
    form.data.kind.value = ON_HUB
    form.data.hub.value = "https://huggingface.co/datasets/owner/set"
    form.data.take.click()
    assert form.choices.overrides["dataset.source"] == "hub:owner/set"
    wait_for(lambda: form.data.problem.value)
    form.settings.wait()
    assert "sx-card" in form.settings.state.value


def test_a_recipe_without_data_waits_for_them(form: Form) -> None:
    form.models.cards.value = "llama-3.1-8b-lora"
    assert form.start.disabled
    wait_for(lambda: form.data.kind.value == UPLOAD)
    assert "GB" in form.models.about.value
    form.wait()  # the demo's data were being read
    assert form.start.disabled
    assert form.data.report.value == ""


def test_a_choice_counts_while_the_budget_arrives() -> None:
    chosen: list[str] = []
    models = ModelSection(lambda recipe, _: chosen.append(recipe))
    is_over = threading.Event()

    def arrive() -> None:
        while not is_over.is_set():
            models.set_budget(128 * GIB)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    wanted = ["qwen3-8b-lora", "llama-3.1-8b-lora"] * 20
    for one in wanted:
        models.show("demo")
        time.sleep(0.002)
        models.cards.value = one
    is_over.set()
    arriving.join()
    assert chosen == wanted


def test_without_a_person_the_stages_run(
    write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = start(write_recipe(), tmp_path / "run")
    assert path is not None
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert (tmp_path / "run/report.html").is_file()
