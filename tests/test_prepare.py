"""The stage: what it writes, what it counts, what it shows, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import WriteRecipe, chat, chats

from strixft.data.batches import collate
from strixft.data.readers import raw_rows
from strixft.formats.sources import SourceFile
from strixft.prepare import build as works
from strixft.prepare.show import page
from strixft.prepare.stage import PROBLEMS_FILE, Prepared, prepare_data, prepare_recipe
from strixft.recipe.load import check_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import DataError, HostError

REAL = os.environ.get("STRIXFT_TEST_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="STRIXFT_TEST_DATA names no folder of real data")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def problems_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / PROBLEMS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Stage:
    """Prepares rows in a folder of its own."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.inputs: dict[str, Any] = {}

    def source(self, rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def run(self, rows: list[Any] | None = None, **dataset: Any) -> dict[str, Any]:
        """The figures of prepared rows."""
        if rows is not None:
            dataset["source"] = str(self.source(rows))
        top = {"thinking": dataset.pop("thinking", "train")}
        section = {"max_length": 256, "validation_fraction": 0.2, **dataset}
        recipe = check_recipe({"model": "m", "dataset": section, **top}, name="r")
        self.recipe = recipe
        self.out = self.folder / "out"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self.inputs, figures = prepare_data(recipe, self.out, self.tokenizer)
        return json.loads(json.dumps(figures, allow_nan=False))  # type: ignore[no-any-return]

    def problems(self) -> list[dict[str, Any]]:
        return problems_of(self.out)

    def prepared(self, figures: dict[str, Any]) -> Prepared:
        return Prepared(
            folder=self.out,
            started="",
            seconds=0,
            versions={},
            host={},
            inputs=self.inputs,
            figures=figures,
        )


@pytest.fixture
def stage(tmp_path: Path, tokenizer: Any) -> Stage:
    """A folder to prepare in."""
    return Stage(tmp_path, tokenizer)


# Counts.


def test_the_figures_add_up(stage: Stage) -> None:
    rows = [*chats(24), chat("Count to 1.", "1"), chat("Hi", "x " * 400), "{no", chat("a", "")]
    figures = stage.run(rows, max_bad_fraction=0.1)
    assert figures["rows_read"] == 28
    assert figures["rows_bad"] == 2
    assert figures["rows_too_long"] == 1
    assert figures["rows_duplicate"] == 1
    used = figures["rows_train"] + figures["rows_validation"]
    assert used == 24
    assert figures["tokens"] < figures["tokens_read"]
    assert 0 < figures["trained_tokens"] < figures["tokens"]
    assert figures["most_trained_tokens"] < figures["longest_tokens"] <= 256
    assert sum(figures["lengths"]["rows"]) == figures["rows_train"]
    assert sum(figures["lengths"]["too_long"]) == 1
    assert figures["mask_checked"] == {"rows": 26, "equal": 26}
    assert figures["answer_ends"] == {"token_ids": [2], "texts": ["<|im_end|>"]}


def test_every_problem_stands_in_the_file_with_its_row_and_what_became_of_it(stage: Stage) -> None:
    rows = [*chats(3), "{no", chat("Count to 1.", "1"), chat("Write to a.b@mail.org", "\u202eok")]
    figures = stage.run(rows, max_bad_fraction=0.2)
    found = [(p["row"], p["kind"], p["action"]) for p in stage.problems()]
    assert sorted(found) == [
        (4, "not_json", "left out"),
        (5, "duplicate", "left out"),
        (6, "email", "kept"),
        (6, "hidden_characters", "kept"),
    ]
    assert {p["file"] for p in stage.problems()} == {str(stage.folder / "rows.jsonl")}
    assert figures["problems"]["duplicate"] == {
        "rows": 1,
        "first": "rows.jsonl, row 5: says the same as row 1",
        "action": "left out",
    }


def test_more_bad_rows_than_allowed_fail_and_the_fix_names_the_setting(stage: Stage) -> None:
    rows = [*chats(20), "{no", '{"messages": 3}']
    with pytest.raises(DataError) as caught:
        stage.run(rows, max_bad_fraction=0.05)
    assert caught.value.problem.startswith(f"2 of 22 rows of {stage.folder / 'rows.jsonl'} cannot")
    assert "rows.jsonl, row 21: is not JSON" in caught.value.problem
    assert "rows.jsonl, row 22: the row has no 'messages' list" in caught.value.problem
    assert caught.value.fix.endswith("--set dataset.max_bad_fraction=0.1")
    assert caught.value.settings == {}, "the rows come first"
    assert [p["row"] for p in stage.problems()] == [21, 22]
    assert stage.run(rows, max_bad_fraction=0.1)["rows_bad"] == 2


def test_a_quote_that_is_never_closed_names_its_row_and_the_lines_it_hides(stage: Stage) -> None:
    rows = ["prompt,completion", 'q1,"a1', *(f"q{n},a{n}" for n in range(2, 100))]
    with pytest.raises(DataError) as caught:
        stage.run(source=str(stage.source(rows, "rows.csv")), max_bad_fraction=1)
    assert caught.value.problem.endswith(
        "rows.csv, row 2: has a quote that is never closed; the lines 3 to 100 after it cannot be"
        " read"
    )
    assert caught.value.fix == (
        f"sed -n 2p {stage.folder / 'rows.csv'}   shows where the row begins; close its quote"
        ' (one in a cell is "")'
    )


def test_a_quote_that_the_next_one_closes_is_to_be_corrected_not_left_out(stage: Stage) -> None:
    rows = ["prompt,completion", *(f"q{n},a{n}" for n in range(1, 100))]
    rows[2], rows[80] = 'q2,"a2', 'q80,"a80"'
    with pytest.raises(DataError) as caught:
        stage.run(source=str(stage.source(rows, "rows.csv")))
    assert "rows.csv, row 3: has a quote that stays open to line 81: " in caught.value.problem
    assert caught.value.fix.startswith(f"sed -n 3p {stage.folder / 'rows.csv'}   shows where")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_text_that_is_not_utf8_comes_with_a_command_that_converts_it(
    stage: Stage, name: str
) -> None:
    rows = [{"prompt": f"Grüße {n}", "completion": "Schön."} for n in range(20)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    tables = [",".join(row.values()) for row in [{"a": "prompt", "b": "completion"}, *rows]]
    text = "\n".join(tables if name.endswith("csv") else lines)
    content = (f"[{','.join(lines)}]" if name.endswith("json") else text).encode("cp1252")
    path = stage.folder / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match="is not UTF-8 text") as caught:
        stage.run(source=str(path))
    command, _, then = caught.value.fix.partition("   ")
    assert then == "makes it UTF-8 if it is Windows-1252"
    subprocess.run(command, shell=True, cwd=stage.folder, check=True)
    (made,) = stage.folder.glob("NEW.*")
    assert stage.run(source=str(made))["rows_read"] == 20


def test_one_row_that_is_not_utf8_is_converted_corrected_or_left_out(stage: Stage) -> None:
    path = stage.folder / "rows.csv"
    path.write_bytes(b"prompt,completion\n" + b"q,a\n" * 9 + b"q,gr\xfcn\n")
    with pytest.raises(DataError) as caught:
        stage.run(source=str(path))
    assert caught.value.fix == (
        f"iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW.csv   makes it UTF-8 if it is Windows-1252;"
        " else correct these rows, or leave them out: --set dataset.max_bad_fraction=0.1"
    )


def test_names_of_columns_that_are_not_utf8_are_told(stage: Stage) -> None:
    path = stage.folder / "rows.csv"
    path.write_bytes(b"prompt,completion,gr\xfcn\nq,a,b\n")
    with pytest.raises(DataError, match="row 1: the header is not UTF-8 text") as caught:
        stage.run(source=str(path))
    assert caught.value.fix.startswith("iconv -f WINDOWS-1252 -t UTF-8 ")


@pytest.mark.parametrize(
    ("name", "content", "problem", "fix"),
    [
        ("a.csv", "prompt,completion\n", "holds no rows", "put a line of column names into it"),
        ("b.csv", "a,b\n1\n2\n", "none of the first 2 rows", "put a line of column names into it"),
        ("c.csv", 'a,b\n"1\n"2,3\n', "stays open to line 3", "sed -n 2p "),
        ("d.txt", " \n", "holds no rows", "put paragraphs into it"),
        ("e.jsonl", "one\ntwo\n", "none of the first 2 rows", "put one JSON object per line"),
        ("f.json", "[]", "holds no rows", "put an array of JSON objects into it"),
    ],
)
def test_a_file_without_a_row_that_can_be_read_says_what_it_should_hold(
    stage: Stage, name: str, content: str, problem: str, fix: str
) -> None:
    (stage.folder / name).write_text(content)
    with pytest.raises(DataError, match=problem) as caught:
        stage.run(source=str(stage.folder / name), max_bad_fraction=1)
    assert caught.value.fix.startswith(fix)


@pytest.mark.parametrize("allowed", [0, 1])
def test_where_all_rows_are_bad_the_fix_shows_columns_and_an_example(
    stage: Stage, allowed: float
) -> None:
    rows = [{"prompt": f"q{n}", "completion": ""} for n in range(3)]
    with pytest.raises(DataError, match="3 of 3 rows") as caught:
        stage.run(rows, max_bad_fraction=allowed)
    assert caught.value.fix.startswith(
        "correct the rows, or --set 'dataset.columns={completion: …, prompt: …}'   or another"
        " dataset.format: row 1 has the columns 'prompt', 'completion'; the format"
        ' prompt-completion reads rows such as {"prompt": "Ping nas.", "completion": '
    )


def test_where_a_format_was_named_that_no_row_has_the_fix_names_the_right_one(
    stage: Stage,
) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(3)]
    with pytest.raises(DataError, match="3 of 3 rows") as caught:
        stage.run(rows, format="alpaca")
    assert caught.value.fix.startswith(
        "correct the rows, or --set dataset.format=prompt-completion: row 1 has the columns"
        " 'prompt', 'completion'; the format alpaca reads rows such as "
    )


def test_where_bad_rows_and_long_ones_leave_nothing_no_share_is_offered(stage: Stage) -> None:
    with pytest.raises(DataError, match="1 of 2 rows") as caught:
        stage.run([chat("Hi", "x " * 400), chat("a", "")])
    assert caught.value.fix == "check the rows, dataset.format and dataset.max_length"


def test_many_bad_rows_are_listed_in_part_and_kept_in_full(stage: Stage) -> None:
    with pytest.raises(DataError) as caught:
        stage.run([*chats(3), *["{no"] * 40])
    assert caught.value.problem.count("\n  ") == 6
    assert "… and 35 more; all of them: " in caught.value.problem
    assert str(stage.out / PROBLEMS_FILE) in caught.value.problem
    assert len(stage.problems()) == 40


def test_nothing_that_is_left_is_an_error_too(stage: Stage) -> None:
    with pytest.raises(DataError, match="1 of 1 rows") as caught:
        stage.run([chat("Hi", "x " * 400)])
    assert "dataset.max_length" in caught.value.fix


def test_keys_that_nothing_reads_are_counted_and_shown(stage: Stage) -> None:
    rows = [{**row, "id": n, "<b>": "x"} for n, row in enumerate(chats(24), start=1)]
    rows[0]["messages"][0]["timestamp"] = "now"
    figures = stage.run(rows, group_by="id")
    assert figures["keys_unused"] == {"<b>": 24, "message.timestamp": 1}
    html = stage.prepared(figures)._repr_html_()
    assert "&lt;b&gt; (24 rows), message.timestamp (1 rows)" in html
    assert "keys not used" not in stage.prepared(stage.run(chats(4)))._repr_html_()


def test_keys_that_should_be_seen_are_refused_with_the_setting_that_ignores_them(
    stage: Stage,
) -> None:
    rows = [{**row, "images": ["a.png"]} for row in chats(8)]
    rows[3]["messages"][1]["tool_plan"] = "I look."
    rows[4]["messages"][1]["it's"] = "I look."
    with pytest.raises(DataError) as caught:
        stage.run(rows)
    assert "row 1: has 'images', and only text is trained: ['a.png']" in str(caught.value)
    assert "row 4: message 2 has 'tool_plan', which is not read: 'I look.'" in str(caught.value)
    assert caught.value.fix is not None
    typed, _, why = caught.value.fix.partition("   ")
    assert shlex.split(typed) == ["--set", """dataset.ignore=["images", "tool_plan", "it's"]"""]
    assert why.startswith("trains without these keys; else")
    assert caught.value.settings == {"dataset.ignore": ["images", "tool_plan", "it's"]}
    assert {p["key"] for p in stage.problems()} == {"images", "tool_plan", "it's"}
    figures = stage.run(rows, ignore=["images", "tool_plan", "it's"])
    assert figures["rows_train"] + figures["rows_validation"] == 8
    assert figures["keys_unused"] == {}


def test_a_row_of_another_format_than_the_first_is_bad_unless_the_format_is_named(
    stage: Stage,
) -> None:
    rows = [*chats(4), {**chat("Is 7 odd?", "No."), "label": False}]
    with pytest.raises(DataError, match="row 5: has the columns of thumbs, and the first row"):
        stage.run(rows)
    assert stage.run(rows, format="messages")["rows_read"] == 5
    both = {**chat("a", "b"), "text": "a b"}
    with pytest.raises(DataError, match="row 5: has the columns of messages and text"):
        stage.run([*chats(4), both])


def test_every_special_token_in_a_row_is_told(stage: Stage) -> None:
    figures = stage.run([*chats(4), chat("<|endoftext|>", "<|im_start|>")])
    assert figures["problems"]["special_token"] == {
        "rows": 1,
        "first": "rows.jsonl, row 5: message 1 contains the token '<|endoftext|>', and 1 more",
        "action": "kept",
    }


def test_the_name_of_a_speaker_that_the_template_hides_is_told(stage: Stage) -> None:
    row = chat("Hello.", "Hello, Ann.")
    row["messages"][0]["name"] = "Bo"
    row["messages"][1]["name"] = "Ann"
    assert stage.run([*chats(4), row])["problems"]["name_hidden"]["first"] == (
        "rows.jsonl, row 5: names who speaks, 'Bo', which the chat template does not show"
    )


def test_an_address_in_a_call_is_masked(stage: Stage) -> None:
    call = {"name": "mail", "arguments": {"to": "a.b@mail.org"}}
    row = chat("Mail it.", "")
    row["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [call]}
    figures = stage.run([*chats(4), row], personal_data="mask")
    assert figures["problems"]["email"]["rows"] == 1


# Policies.


def test_a_row_too_long_is_dropped_and_counted_apart(stage: Stage) -> None:
    figures = stage.run([*chats(4), chat("Hi", "x " * 400)])
    assert (figures["rows_bad"], figures["rows_too_long"]) == (0, 1)
    assert [(p["row"], p["kind"]) for p in stage.problems()] == [(5, "too_long")]
    assert "tokens, max_length is 256" in stage.problems()[0]["text"]


@pytest.mark.parametrize(("short", "told"), [(12, True), (100, False)])
def test_losing_more_than_a_twentieth_names_the_length_that_would_keep_them(
    stage: Stage, short: int, told: bool
) -> None:
    few = [chat(f"Say {n}.", "yes") for n in range(short)]
    rows = [*few, *(chat(f"Say x {n} times.", "x " * n) for n in (300, 310, 320))]
    notes = [text for text in stage.run(rows)["notes"] if "max_length" in text]
    assert notes == (
        [
            f"3 of {short + 3} rows are longer than max_length 256 and left out; 98% are kept by"
            " --set dataset.max_length=384"
        ]
        * told
    )
    kept = stage.run(rows, max_length=384)
    assert kept["rows_too_long"] == 0


def test_a_row_too_long_can_be_an_error(stage: Stage) -> None:
    with pytest.raises(DataError, match="row 5: has 4") as caught:
        stage.run([*chats(4), chat("Hi", "x " * 400)], too_long="error")
    assert "--set dataset.too_long=drop" in caught.value.fix


def test_a_row_too_long_can_be_cut_and_one_without_an_answer_left_is_not_trained(
    stage: Stage,
) -> None:
    rows = [*chats(4), chat("Hi", "x " * 400), chat("y " * 400, "No.")]
    figures = stage.run(rows, too_long="truncate", validation_fraction=0)
    assert figures["longest_tokens"] == 256
    assert [(p["row"], p["kind"], p["action"]) for p in stage.problems()] == [
        (5, "cut", "cut"),
        (6, "too_long", "left out"),
    ]


@pytest.mark.parametrize(("policy", "rows"), [("truncate", 1), ("split", 25)])
def test_a_text_of_megabytes_is_cut_or_split_without_being_held_as_tokens(
    stage: Stage, policy: str, rows: int
) -> None:
    text = "All work and no play. " * 300_000
    figures = stage.run(
        [{"text": text}, {"text": "Short."}], too_long=policy, validation_fraction=0
    )
    assert figures["rows_too_long"] == 0
    assert figures["longest_tokens"] == 256
    assert figures["rows_train"] >= rows + 1


def test_a_chat_too_long_can_be_split_and_its_parts_stay_on_one_side(stage: Stage) -> None:
    turns = [
        {"role": role, "content": f"{role} {n} " + "word " * 30}
        for n in range(12)
        for role in ("user", "assistant")
    ]
    rows = [*chats(6), {"messages": turns}, chat("Hi", "x " * 400)]
    figures = stage.run(rows, too_long="split", validation_fraction=0.3)
    assert figures["rows_too_long"] == 1  # one exchange alone is too long
    (note,) = [p for p in stage.problems() if p["kind"] == "split"]
    assert note["row"] == 7
    both = stage.prepared(figures).token_rows(stage.recipe.dataset)
    parts = [
        [row["part"] for row in rows if row["row"] == 7] for rows in (both.train, both.validation)
    ]
    assert [] in parts
    assert max(parts, key=len) == list(range(len(max(parts, key=len)))) != [0]


def test_duplicates_can_be_kept(stage: Stage) -> None:
    figures = stage.run([*chats(6), *chats(6)], duplicates="keep")
    assert figures["rows_duplicate"] == 6
    assert figures["rows_train"] + figures["rows_validation"] == 12
    assert {p["action"] for p in stage.problems()} == {"kept"}


def test_near_duplicates_are_looked_for_on_request(stage: Stage) -> None:
    long = " ".join(f"word{n}" for n in range(60))
    rows = [*chats(6), chat("Say it.", long), chat("Say it.", long.replace("word30", "other"))]
    assert stage.run(rows)["rows_near_duplicate"] == 0
    figures = stage.run(rows, near_duplicates="drop", max_length=512)
    assert figures["rows_near_duplicate"] == 1
    assert figures["rows_train"] + figures["rows_validation"] == 7
    assert stage.problems()[-1]["text"] == "says nearly the same as row 7"
    kept = stage.run(rows, near_duplicates="report", max_length=512)
    assert kept["rows_train"] + kept["rows_validation"] == 8


@pytest.mark.parametrize(
    ("policy", "rows", "action"),
    [("report", 7, "kept"), ("mask", 7, "masked"), ("drop", 6, "left out")],
)
def test_personal_data_are_reported_and_only_touched_on_request(
    stage: Stage, policy: str, rows: int, action: str
) -> None:
    mail = chat("My address is anna@mail.org and bert@mail.org.", "Noted: anna@mail.org.")
    figures = stage.run([*chats(6), mail], personal_data=policy)
    assert figures["rows_train"] + figures["rows_validation"] == rows
    (problem,) = stage.problems()
    assert (problem["kind"], problem["action"], problem["row"]) == ("email", action, 7)
    assert problem["text"] == (
        "has what looks like an e-mail address: an… (13 characters), and 2 more"
    )
    both = stage.prepared(figures).token_rows(stage.recipe.dataset)
    text = " ".join(row["request"] + row["answer"] for rows in (both.train, both.validation)
                    for row in rows)  # fmt: skip
    assert ("anna@mail.org" in text) is (policy == "report")
    assert ("[email]" in text) is (policy == "mask")
    assert figures["rows_left_out"] == (1 if policy == "drop" else 0)


def test_a_question_trained_and_held_out_is_a_leak_that_group_by_mends(stage: Stage) -> None:
    rows = [chat(f"Question {n % 40}?", f"Answer {n}.") for n in range(120)]
    figures = stage.run(rows, validation_fraction=0.3)
    assert figures["leaks"] > 5
    (note,) = figures["notes"]
    assert note.endswith("--set dataset.group_by=question")
    (leak, *_) = [p for p in stage.problems() if p["kind"] == "leak"]
    assert "is held out, and asks what row" in leak["text"]
    assert leak["action"] == "kept"
    mended = stage.run(rows, validation_fraction=0.3, group_by="question")
    assert mended["leaks"] == 0
    assert mended["rows_validation"] > 10


def test_rows_of_one_customer_stay_on_one_side(stage: Stage) -> None:
    rows = [{**chat(f"Q{n}?", f"A{n}."), "who": {"id": n % 15}} for n in range(90)]
    figures = stage.run(rows, group_by="who.id", validation_fraction=0.3)
    both = stage.prepared(figures).token_rows(stage.recipe.dataset)
    customers = [{(row - 1) % 15 for row in rows["row"]} for rows in (both.train, both.validation)]
    assert not customers[0] & customers[1]
    assert all(customers)


def test_a_row_without_the_column_of_its_group_is_bad(stage: Stage) -> None:
    rows: list[Any] = [{**chat("Q?", "A."), "who": 1}, chat("R?", "B.")]
    with pytest.raises(DataError, match=r"row 2: has no .who., which dataset\.group_by names"):
        stage.run(rows, group_by="who")


# Formats and sources.


def test_sources_are_mixed_by_their_weights(stage: Stage) -> None:
    one = stage.source(chats(12), "one.jsonl")
    two = stage.source([{"question": f"q{n}", "answer": f"a{n}"} for n in range(60)], "two.jsonl")
    figures = stage.run(
        source=[{"source": str(one), "weight": 3}, {"source": str(two), "weight": 0.5}],
        validation_fraction=0,
    )
    assert figures["format"] == "messages, question-answer"
    assert figures["rows_read"] == 72
    rows = stage.prepared(figures).token_rows(stage.recipe.dataset).train
    counts = np.bincount(rows["file"])
    assert counts[0] == 36
    assert 18 <= counts[1] <= 42
    assert [file["path"] for file in stage.inputs["files"]] == [str(one), str(two)]


def test_plain_text_is_trained_whole_whatever_loss_on_says(stage: Stage) -> None:
    figures = stage.run([{"text": f"Text number {n}. " * 3} for n in range(9)])
    assert (figures["kind"], figures["loss_on"]) == ("text", "all")
    assert figures["trained_tokens"] == figures["tokens"] - figures["rows_train"]


PAIRS = [{"prompt": f"Q{n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(9)]
THUMBS = [{**chat(f"Q{n}?", f"A{n}."), "label": n % 3 > 0} for n in range(9)]


@pytest.mark.parametrize(
    ("rows", "kind", "form", "left"),
    [(PAIRS, "pairs", "chosen", 9), (THUMBS, "thumbs", "thumbs-up", 6)],
)
def test_preferences_are_prepared_and_refused_for_training_with_what_to_type(
    stage: Stage, rows: list[Any], kind: str, form: str, left: int
) -> None:
    figures = stage.run(rows)
    assert figures["kind"] == kind
    with pytest.raises(DataError, match="holds preferences") as caught:
        stage.prepared(figures).token_rows(stage.recipe.dataset)
    assert f"--set dataset.format={form}" in caught.value.fix
    chosen = stage.run(rows, format=form)
    assert chosen["kind"] == "chat"
    assert chosen["rows_train"] + chosen["rows_validation"] == left
    assert chosen["rows_left_out"] == 9 - left


def test_both_answers_of_a_pair_are_on_disk(stage: Stage) -> None:
    stage.run(PAIRS)
    from datasets import Dataset

    row = Dataset.from_file(str(stage.out / "rows.arrow"))[0]
    for ids, trained, text in (
        ("input_ids", "trained", "Good 0.<|im_end|>"),
        ("rejected_input_ids", "rejected_trained", "Bad 0.<|im_end|>"),
    ):
        kept = [token for token, flag in zip(row[ids], row[trained], strict=True) if flag]
        assert stage.tokenizer.decode(kept) == text


def test_reasoning_that_the_template_hides_makes_more_rows_and_is_told(
    stage: Stage, tokenizer: Any
) -> None:
    import copy

    stage.tokenizer = copy.deepcopy(tokenizer)
    stage.tokenizer.chat_template = (
        Path(__file__).parent / "templates" / "qwen3.jinja"
    ).read_text()
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "Hi"),
            ("assistant", "<think>\nfirst\n</think>\n\nHello."),
            ("user", "Bye"),
            ("assistant", "<think>\nsecond\n</think>\n\nBye."),
        )
    ]
    rows = [{"messages": turns}, *chats(3)]
    figures = stage.run(rows, validation_fraction=0)
    assert figures["rows_train"] == 5
    assert figures["notes"][0].startswith("1 chats became several rows each")
    assert figures["thinking"] == {"rows": 1, "of": 4, "as": "train"}
    assert figures["notes"][1].startswith("1 of 4 rows have reasoning before an answer, and the")
    assert "25%, 1 rows, trained" in page(figures)

    dropped = stage.run(rows, validation_fraction=0, thinking="drop")
    assert (dropped["rows_train"], dropped["notes"]) == (4, [])
    stage.tokenizer.chat_template += "{%- if enable_thinking is defined %}{% endif %}"
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    told = stage.run(rows, validation_fraction=0, **off)["notes"]
    assert told[1].endswith("To leave it out: --set thinking=drop")
    kept = stage.run(rows, validation_fraction=0, thinking="keep")
    assert kept["tokens"] == figures["tokens"]
    assert kept["trained_tokens"] < dropped["trained_tokens"] < figures["trained_tokens"]
    assert kept["mask_checked"] == {"rows": 5, "equal": 5}


def test_rows_that_differ_in_their_reasoning_alone_are_one_row_where_it_is_dropped(
    stage: Stage,
) -> None:
    rows = [chat("Hi", f"<think>{n}</think>Hello.") for n in range(3)]
    assert stage.run([*rows, *chats(3)], thinking="drop")["rows_duplicate"] == 2
    assert stage.run([*rows, *chats(3)], thinking="keep")["rows_duplicate"] == 0


# Packing, order, and the same result every time.


def test_packed_rows_hold_every_training_row_and_make_batches(stage: Stage) -> None:
    figures = stage.run(chats(40))
    prepared = stage.prepared(figures)
    packed, rows = (
        prepared.packed_rows(stage.recipe.dataset),
        prepared.token_rows(stage.recipe.dataset),
    )
    assert figures["packing"]["rows"] == len(packed) < len(rows.train)
    assert figures["packing"]["fill"] > figures["packing"]["fill_without"]
    assert sum(len(row["input_ids"]) for row in packed) == figures["tokens"]
    batch = collate(packed[:3])
    assert batch["num_tokens"] == sum(len(row["input_ids"]) for row in packed[:3])
    assert sum(len(collate([row])["labels"]) for row in packed) == figures["trained_tokens"]


def test_the_same_data_give_the_same_files(stage: Stage) -> None:
    first = stage.run(chats(30)), stage.inputs
    content = {path.name: path.read_bytes() for path in stage.out.iterdir()}
    again = stage.run(chats(30)), stage.inputs
    assert {path.name: path.read_bytes() for path in stage.out.iterdir()} == content
    assert first[1] == again[1]
    drop = {"rows_per_s", "tok_per_s"}
    assert {k: v for k, v in first[0].items() if k not in drop} == {
        k: v for k, v in again[0].items() if k not in drop
    }


def test_several_processes_give_what_one_gives(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*chats(30), "{no", *[chat(f"Question {n}?", f"Answer {n} to it.") for n in range(300)]]
    monkeypatch.setattr(works, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(works, "num_processes", lambda: 1)
    one = stage.run(rows, max_bad_fraction=0.1)
    content = {path.name: path.read_bytes() for path in stage.out.iterdir()}
    monkeypatch.setattr(works, "num_processes", lambda: 2)
    two = stage.run(rows, max_bad_fraction=0.1)
    assert {path.name: path.read_bytes() for path in stage.out.iterdir()} == content
    assert one["problems"] == two["problems"]
    assert one["rows_train"] == two["rows_train"]


def _end(job: object) -> object:
    os._exit(9)


def test_a_process_that_ends_is_an_error_that_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(works, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(works, "num_processes", lambda: 2)
    monkeypatch.setattr(works, "_make", _end)
    with pytest.raises(HostError, match="a process that prepared data ended after row 16"):
        stage.run(chats(60))


def test_words_that_lie_start_the_work_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from strixft.data import word_cache

    true = stage.run(chats(60), max_length=512)
    content = (stage.out / "rows.arrow").read_bytes()
    monkeypatch.setattr(word_cache, "_cuts_before_spaces", lambda backend: True)
    monkeypatch.setattr(word_cache, "_cut", list)  # every character a word
    assert stage.run(chats(60), max_length=512)["tokens"] == true["tokens"]
    assert (stage.out / "rows.arrow").read_bytes() == content


# The page.


class _Tags(HTMLParser):
    """Counts the tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def test_the_page_shows_trained_and_masked_tokens_apart(stage: Stage) -> None:
    html = stage.prepared(stage.run(chats(24)))._repr_html_()
    assert html.count('<pre class="sx-row"') == 5
    assert html.count('class="sx-trained"') == 5
    assert html.count('class="sx-masked"') == 10
    assert "&lt;|im_start|&gt;assistant" in html
    assert "data:image/png;base64," in html
    assert "fill, packed" in html


NASTY = [
    "</pre></td></table><script>alert('x')</script>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil\u202c",
    "$\\frac{1}{0}$ {{ x }} `code`",
    "\x1b[31mred\x00",
    "</bdi><style>body{display:none}</style>",
]


def test_nothing_that_data_say_becomes_part_of_the_page(stage: Stage) -> None:
    rows = [chat(text, f"{text} {n}") for n, text in enumerate(NASTY)]
    name = "<b>rows.jsonl"
    figures = stage.run(source=str(stage.source([*rows, "{no"], name)), max_bad_fraction=1)
    html = stage.prepared(figures)._repr_html_()
    assert set(_Tags(html).tags) == {
        *("table", "tr", "td", "th", "p", "pre", "bdi", "span", "img", "style")
    }
    for hidden in ("\u202e", "\x1b", "\x00", "<script", "onerror=alert(1)>"):
        assert hidden not in html
    assert "⟦U+202E⟧" in html
    assert "⟦U+001B⟧" in html


def test_the_cut_stands_in_the_picture_of_lengths(stage: Stage) -> None:
    from strixft.prepare import show

    figures = stage.run([*chats(24), chat("Hi", "x " * 400)])
    assert max(figures["lengths"]["edges"]) > 256
    assert show.lengths(figures).startswith('<img class="sx"')


# The run.


def test_the_stage_writes_its_result_and_is_not_done_again(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe()
    run = open_run(recipe, tmp_path / "run")
    prepared = prepare_recipe(run)
    result = json.loads((run.folder / "prepare" / "result.json").read_text())
    assert result["figures"] == json.loads(json.dumps(prepared.figures))
    (file,) = result["inputs"]["files"]
    assert file["sha256"] == result["inputs"]["source_sha256"]
    assert Prepared.load(run.stage_folder("prepare")) == prepared
    assert prepare_recipe(open_run(recipe, tmp_path / "run")).started == prepared.started
    assert {path.name for path in run.stage_folder("prepare").iterdir()} == {
        "result.json",
        "rows.arrow",
        "order.npz",
        "problems.jsonl",
    }


def test_the_report_shows_the_rows_as_the_notebook_does(tiny_run: Run) -> None:
    from strixft.app.report import render_report

    prepared = prepare_recipe(tiny_run)
    assert prepared._repr_html_() in render_report(tiny_run)


def test_a_file_that_is_added_to_a_folder_is_noticed(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(12)))
    recipe = write_recipe()
    settings = yaml.safe_load(recipe.read_text())
    settings["dataset"]["source"] = "data"
    recipe.write_text(yaml.safe_dump(settings))
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    open_run(recipe, tmp_path / "run")
    (folder / "b.jsonl").write_text(json.dumps(chat("New?", "Yes.")) + "\n")
    again = prepare_recipe(open_run(recipe, tmp_path / "run"))
    assert again.figures["rows_read"] == 13


# Real data.

REAL_FILES = {
    "alpaca_en_demo.json": ("alpaca", "chat", 999),
    "c4_demo.jsonl": ("text", "text", 300),
    "dpo_en_demo.json": ("preference", "pairs", 300),
    "glaive_toolcall_en_demo.json": ("sharegpt", "chat", 300),
    "gsm8k_test.jsonl": ("question-answer", "chat", 1319),
    "kto_en_demo.json": ("thumbs", "thumbs", 300),
    "wikisql_test.jsonl": ("text", "text", 100),
    "wikisql_train.jsonl": ("text", "text", 1000),
}


@needs_real
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_data_go_through_as_they_are(stage: Stage, name: str) -> None:
    figures = stage.run(source=str(Path(str(REAL), name)), max_length=2048)
    assert (figures["format"], figures["kind"], figures["rows_read"]) == REAL_FILES[name]
    assert figures["rows_bad"] == 0
    assert figures["mask_checked"]["equal"] == figures["mask_checked"]["rows"] > 0
    left_out = figures["rows_too_long"] + figures["rows_duplicate"]
    used = figures["rows_train"] + figures["rows_validation"]
    assert used == figures["rows_read"] - left_out
    assert stage.prepared(figures)._repr_html_().count("<pre") == 5


@needs_real
@pytest.mark.parametrize(
    ("name", "form"), [("dpo_en_demo.json", "chosen"), ("kto_en_demo.json", "thumbs-up")]
)
def test_real_preferences_can_be_read_as_chats(stage: Stage, name: str, form: str) -> None:
    figures = stage.run(source=str(Path(str(REAL), name)), format=form, max_length=2048)
    assert figures["kind"] == "chat"
    rows = stage.prepared(figures).token_rows(stage.recipe.dataset)
    assert len(rows.train) == figures["rows_train"] > 100


@needs_real
def test_real_answers_of_many_lines_are_read_from_csv_as_they_were(tmp_path: Path) -> None:
    rows = json.loads(Path(str(REAL), "alpaca_en_demo.json").read_text(encoding="utf-8"))
    with (path := tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    assert sum(row["output"].count("\n") > 5 for row in rows) > 50
    assert [row for _, row, _ in raw_rows(SourceFile(path, "csv"))] == rows


@needs_real
def test_nested_real_data_say_which_mapping_to_write_and_it_works(stage: Stage) -> None:
    source = str(Path(str(REAL), "self_instruct_seed_tasks.jsonl"))
    with pytest.raises(DataError) as caught:
        stage.run(source=source)
    assert "row 1: no format has the columns 'id', 'name', 'instruction'" in caught.value.problem
    mapping = yaml.safe_load(caught.value.fix.split("dataset.columns=")[1].strip("'"))
    assert mapping == {
        "instruction": "instruction",
        "output": "instances.0.output",
        "input": "instances.0.input",
    }
    figures = stage.run(source=source, columns=mapping, max_length=2048)
    assert (figures["format"], figures["rows_read"], figures["rows_bad"]) == ("alpaca", 175, 0)


@needs_real
def test_calls_of_real_data_are_trained(stage: Stage) -> None:
    figures = stage.run(
        source=str(Path(str(REAL), "glaive_toolcall_en_demo.json")), max_length=2048
    )
    rows = stage.prepared(figures).token_rows(stage.recipe.dataset).train
    trained = [
        stage.tokenizer.decode([t for t, f in zip(r["input_ids"], r["trained"], strict=True) if f])
        for r in rows
    ]
    assert sum("<tool_call>" in text for text in trained) > 50
    assert not any("<tool_response>" in text for text in trained)
