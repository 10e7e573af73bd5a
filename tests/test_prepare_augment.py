"""Rows that a server writes: where they come from, what is refused, and how to undo it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import EMBEDDED, WriteRecipe, chat, chats, mark_as_trained
from http_server import serving
from test_evaluate_judge import CHAT, MODELS, completion
from typer.testing import CliRunner

from strixft.app.cli import app
from strixft.app.report import render_report
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat
from strixft.model.files import embedded_file
from strixft.prepare.augment import TASKS, SourceRow, prompt_for
from strixft.prepare.stage import Prepared, prepare_recipe
from strixft.recipe.servers import Augment
from strixft.run.open import open_run
from strixft.servers.llama_cpp import served
from strixft.support.errors import DataError, HostError, RecipeError

LONG = "{} of them, from one to the last, in their order and without a gap between any two"
ROWS = [chat(f"Please name all the numbers up to {n} now.", LONG.format(n)) for n in range(20, 50)]
CAPITALS = [
    ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Greece", "Athens"),
    ("Norway", "Oslo"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Cuba", "Havana"),
    ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Chile", "Santiago"), ("Austria", "Vienna"),
]  # fmt: skip
SWITCHED_ON = {"dataset.augment.enabled": True}
Write = Callable[..., Prepared]


def part(body: Mapping[str, Any], name: str) -> str:
    """Return the text of a tag of a request."""
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", body["messages"][-1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def politely(body: Mapping[str, Any]) -> dict[str, Any]:
    """Say a request in other words."""
    number = re.findall(r"\d+", part(body, "request"))[-1]
    return completion(json.dumps({"request": f"Could you count from one to {number} for me?"}))


@pytest.fixture
def prepared(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Prepares rows with what a server writes."""
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))

    def prepare(url: str | None, run: str = "run", rows: Any = ROWS, **settings: Any) -> Prepared:
        dataset = settings.pop("dataset", {})
        augment = {"server": url, "enabled": True, **settings} if url else None
        recipe = write_recipe(rows=rows, dataset={**dataset, "augment": augment})
        return prepare_recipe(open_run(recipe, tmp_path / run))

    return prepare


def written(found: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.folder / "augmented.jsonl").open()]


def requests_of(found: Prepared, recipe_dataset: Any, part: str) -> list[str]:
    return list(getattr(found.token_rows(recipe_dataset), part)["request"])


def test_a_real_server_writes_rows_that_say_where_they_come_from(prepared: Write) -> None:
    with served(embedded_file(EMBEDDED), 1024) as url:
        settings: dict[str, Any] = {
            "max_rows": 2,
            "max_tokens": 48,
            "task": "answer",
            "temperature": 0,
        }
        settings["rows"] = [chat(f"What is the capital of {c}?", f"{t}.") for c, t in CAPITALS]
        found = prepared(url, **settings)
        again = prepared(url, "again", **settings)
    figures = found.figures["augment"]
    assert figures["rows_asked"] == figures["rows_sent"] == 2
    assert figures["rows_kept"] + sum(row["rows"] for row in figures["refused"].values()) == 2
    assert figures["rows_kept"] == len(written(found)) > 0
    provenance = written(found)[0]["provenance"]
    assert provenance["source"].endswith("tiny.jsonl")
    assert provenance["model"].endswith(".gguf")
    assert (provenance["server"], provenance["task"]) == (url, "answer")
    assert re.fullmatch(r"[0-9a-f]{64}", provenance["prompt_sha256"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", provenance["date"])
    assert written(again) == written(found)
    assert again.figures["augment"]["requests"] == 0


def test_held_out_rows_are_neither_sent_nor_changed(prepared: Write) -> None:
    plain = prepared(None, "plain")
    with serving({**MODELS, CHAT: politely}) as (url, seen):
        found = prepared(url)
    sent = [part(body, "request") for path, body in seen if path == CHAT]
    dataset = open_run(found.folder.parent / "recipe.yaml", found.folder.parent).recipe.dataset
    held_out = requests_of(found, dataset, "validation")
    assert held_out == requests_of(plain, dataset, "validation")
    assert len(held_out) > 2
    assert not set(sent) & set(held_out)
    train = requests_of(found, dataset, "train")
    assert train[: -len(written(found))] == requests_of(plain, dataset, "train") == sent
    assert train[-1].startswith("Could you count from one to")
    figures = found.figures["augment"]
    assert figures["rows_trained"] == figures["rows_kept"] == len(sent)
    assert found.figures["leaks"] == plain.figures["leaks"] == 0
    assert found.names_of(found.token_rows(dataset).train, [-1])[0].endswith(
        f"augmented.jsonl, row {len(sent)}"
    )


def test_without_the_flag_the_data_are_those_of_before(prepared: Write) -> None:
    before = prepared(None, "before")
    with serving({**MODELS, CHAT: politely}) as (url, _):
        prepared(url, "augmented")
        after = prepared(url, "after", enabled=False)
    assert after.inputs == before.inputs
    assert after.figures.keys() == before.figures.keys()
    names = ("train", "validation", "packed_rows", "packed_starts")
    both = [np.load(one.folder / "order.npz") for one in (before, after)]
    for name in names:
        np.testing.assert_array_equal(both[0][name], both[1][name])
    assert after.augmented is None


def test_what_is_not_usable_is_counted_with_its_reason(prepared: Write) -> None:
    plain = prepared(None, "plain")
    rows = plain.token_rows(open_run(plain.folder.parent / "recipe.yaml").recipe.dataset)
    held_out, trained = rows.validation[0], rows.train[3]
    new = {"request": "Which numbers are there?", "answer": "Many."}
    near = {"request": held_out["request"].replace("Please", "Kindly"), **_answer(held_out)}
    replies = [
        {"request": held_out["request"], "answer": "Another one."},
        near,
        {"request": trained["request"], "answer": "Another one."},
        new,
        new,
        {"answer": "no request"},
        "I will not.",
        {"request": "…", "answer": "x"},
        {"request": "Ping it.\n</request>", "answer": "x"},
        (400, {"error": "too long"}),
        (400, {"error": "too long"}),  # once more without a schema
        completion('{"request": "Wh', finish_reason="length"),
    ]
    left = iter(replies)

    def reply(_: Mapping[str, Any]) -> Any:
        said = next(left)
        if isinstance(said, tuple) or (isinstance(said, dict) and "choices" in said):
            return said
        return completion(said if isinstance(said, str) else json.dumps(said))

    with serving({**MODELS, CHAT: reply}) as (url, _):
        found = prepared(url, task="write", max_rows=11)
    figures = found.figures["augment"]
    assert {kind: row["rows"] for kind, row in figures["refused"].items()} == {
        "held_out": 1,
        "near_held_out": 1,
        "duplicate": 2,
        "no_json": 2,
        "copied": 2,
        "server_refuses": 1,
        "cut": 1,
    }
    assert (figures["rows_asked"], figures["rows_kept"], figures["rows_trained"]) == (11, 1, 1)
    assert "asks what a held-out row asks" in figures["refused"]["held_out"]["first"]
    assert [m["content"] for m in written(found)[0]["messages"]] == list(new.values())
    html = found._repr_html_()
    assert "near held out: 1" in html
    assert "m on the NPU" in html
    assert found.augmented is not None
    assert "Which numbers are there?" in found.augmented._repr_html_()


def _answer(row: Mapping[str, Any]) -> dict[str, str]:
    return {"answer": row["answer"]}


def test_a_paraphrase_keeps_the_numbers(prepared: Write) -> None:
    reply = completion('{"request": "Count to 21, please."}')
    with serving({**MODELS, CHAT: lambda _: reply}) as (url, _):
        found = prepared(url, rows=chats(24), max_rows=5)
    figures = found.figures["augment"]
    assert figures["refused"]["numbers"]["rows"] == 5
    assert re.search(r"row \d+: the new request lacks \d+", figures["refused"]["numbers"]["first"])
    assert figures["rows_kept"] == 0
    assert found.figures["rows_train"] > 10


def test_an_answer_in_json_stays_one(prepared: Write) -> None:
    rows = [chat(f"Ping machine {n}.", json.dumps({"ping": n})) for n in range(20)]
    replies = iter(["Ping!", '{"ping": "all"}'])
    routes = {**MODELS, CHAT: lambda _: completion(json.dumps({"answer": next(replies)}))}
    with serving(routes) as (url, _):
        found = prepared(url, rows=rows, task="answer", max_rows=2)
    assert found.figures["augment"]["refused"]["no_json_answer"]["rows"] == 1
    assert written(found)[0]["messages"][1]["content"] == '{"ping": "all"}'


def test_a_server_that_dies_leaves_what_it_wrote(prepared: Write) -> None:
    count = iter(range(999))

    def dies(body: Mapping[str, Any]) -> Any:
        return politely(body) if next(count) < 4 else (401, {"error": "expired"})

    answers = [dies]
    routes = {**MODELS, CHAT: lambda body: answers[0](body)}
    with serving(routes) as (url, seen):
        with pytest.raises(HostError, match=r"401: expired; 4 of \d+ rows are done") as caught:
            prepared(url)
        answers[0] = politely
        before = len(seen)
        found = prepared(url)
    figures = found.figures["augment"]
    assert "the same command goes on from there" in caught.value.fix
    assert figures["requests_kept"] == 4
    assert len(seen) - before == 1 + figures["rows_asked"] - 4


def test_several_rows_of_one_row_are_asked_with_other_seeds(prepared: Write) -> None:
    def numbered(body: Mapping[str, Any]) -> dict[str, Any]:
        number = re.findall(r"\d+", part(body, "request"))[-1]
        return completion(json.dumps({"request": f"Count to {number}, {body['seed']} times."}))

    with serving({**MODELS, CHAT: numbered}) as (url, seen):
        found = prepared(url, per_row=3, max_rows=2, temperature=0.5, instruction="In German.")
    bodies = [body for path, body in seen if path == CHAT]
    assert [body["seed"] for body in bodies] == [0, 1, 2] * 2
    assert bodies[0]["temperature"] == 0.5
    assert "In German." in bodies[0]["messages"][0]["content"]
    assert found.figures["augment"]["rows_kept"] == 6


def test_written_rows_share_the_group_of_their_source(prepared: Write) -> None:
    rows = [{**row, "meta": {"who": f"c{n % 6}"}} for n, row in enumerate(ROWS)]
    with serving({**MODELS, CHAT: politely}) as (url, _):
        found = prepared(url, rows=rows, dataset={"group_by": "meta.who"})
    assert found.figures["rows_bad"] == 0
    assert all(row["meta.who"] in {f"c{n}" for n in range(6)} for row in written(found))
    assert found.figures["augment"]["rows_trained"] > 0


def test_text_is_not_augmented(prepared: Write) -> None:
    with (
        serving({**MODELS, CHAT: politely}) as (url, seen),
        pytest.raises(DataError, match=r"holds no chats \(text\)") as caught,
    ):
        prepared(url, rows=[{"text": f"Some text of row {n}."} for n in range(9)])
    assert "without --augment" in caught.value.fix
    assert seen == []


def test_personal_data_do_not_leave_the_machine() -> None:
    messages = chat("Write to anna@mail.org.", "Done.")["messages"]
    row = SourceRow("a.jsonl", 1, Chat(messages), {})
    assert row.messages(leaves=False) == messages
    with pytest.raises(RowFault, match="personal data, and the server is another machine"):
        row.messages(leaves=True)


def test_masked_data_are_sent_masked(prepared: Write) -> None:
    rows = [chat(f"Please write to anna{n}@mail.org now number {n}.", "Ok.") for n in range(9)]
    with serving({**MODELS, CHAT: politely}) as (url, seen):
        prepared(url, rows=rows, dataset={"personal_data": "mask"})
    sent = [json.dumps(body) for path, body in seen if path == CHAT]
    assert len(sent) > 4
    assert all("[email]" in text and "anna" not in text for text in sent)


def test_rows_with_tools_have_no_exchange_to_say_otherwise() -> None:
    def sent(of: Chat) -> Any:
        return SourceRow("a.jsonl", 1, of, {}).messages(leaves=True)

    messages = chat("Ping nas.", "Ok.")["messages"]
    assert sent(Chat(messages)) == messages
    assert sent(Chat([*messages, {"role": "user", "content": "And?"}])) == messages
    for other in (
        Chat(messages, tools=[{"type": "function"}]),
        Chat([messages[0], {**messages[1], "tool_calls": []}]),
        Chat(messages[1:]),
    ):
        with pytest.raises(RowFault, match="uses tools, or does not end with a request"):
            sent(other)


def test_each_task_makes_its_row() -> None:
    first = [{"role": "system", "content": "Be brief."}, *chat("A?", "B.")["messages"]]
    messages = [*first, *chat("C?", "D.")["messages"]]
    texts = {"request": "E?", "answer": "F."}
    made = {
        name: [m["content"] for m in task.make(messages, texts)] for name, task in TASKS.items()
    }
    assert made == {
        "paraphrase": ["Be brief.", "A?", "B.", "E?", "D."],
        "answer": ["Be brief.", "A?", "B.", "C?", "F."],
        "write": ["Be brief.", "E?", "F."],
    }
    assert tuple(TASKS) == get_args(Augment.model_fields["task"].annotation)
    shown = prompt_for(TASKS["paraphrase"], messages, None)[1]["content"]
    assert "system: Be brief.\nuser: A?\nassistant: B." in shown


def test_the_flag_is_a_setting_of_the_recipe(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    type_in = CliRunner().invoke
    with serving({**MODELS, CHAT: politely}) as (url, _):
        recipe = str(write_recipe(rows=ROWS, dataset={"augment": {"server": url}}))
        words = ["prepare", recipe, "--run-dir", str(tmp_path / "run")]
        done = type_in(app, [*words, "--augment", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["figures"]["augment"]["rows_trained"] > 10
    mark_as_trained(tmp_path / "run")
    without = type_in(app, words)
    assert isinstance(without.exception, RecipeError)
    assert "dataset.augment.enabled: True there, False here" in without.exception.problem
    assert without.exception.fix == (
        f"--run-dir {tmp_path / 'run-2'}   for a new run; or, with strixft run,"
        " --from prepare   repeats prepare and the later stages"
    )
    none = type_in(app, ["prepare", str(write_recipe("none", rows=ROWS)), "--augment"])
    assert "dataset.augment.server: is missing" in str(none.exception)
    assert "rows written by" in render_report(open_run(recipe, tmp_path / "run", SWITCHED_ON))
