"""Rows say the same in whichever kind of file they stand; Arrow's nulls are gone again."""

from __future__ import annotations

import csv
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import strategies
from hypothesis import given, settings

from strixft.data.load import HubSet, open_inputs
from strixft.data.row_report import Problem
from strixft.formats.messages import Chat
from strixft.recipe.schema import Dataset
from strixft.support.errors import DataError

Rows = list[dict[str, Any]]


def read(path: Path) -> list[Chat | Problem]:
    """The chats of a file or a folder."""
    (one,) = open_inputs(Dataset(source=str(path)))
    found = strategies.read_rows(one)
    return [made if isinstance(made, Problem) else made[1] for made in found]


def as_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def filled(rows: Rows) -> Rows:
    """The rows with the columns of all: Arrow asks the first row alone for its columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{**names, **row} for row in rows]


def as_csv(path: Path, rows: Rows) -> Path:
    """A table of which cells that are no text hold JSON."""
    columns = list(filled(rows)[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            cells = [row.get(name, "") for name in columns]
            writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return path


def as_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(filled(rows)), path)
    return path


def as_folder(path: Path, rows: Rows) -> Path:
    """What `datasets` saves."""
    import datasets

    datasets.Dataset.from_list(filled(rows)).save_to_disk(path)
    return path


@given(strategies.files())
@settings(max_examples=60, deadline=None)
def test_rows_say_the_same_in_every_kind_of_file(made: list[tuple[dict[str, Any], Any]]) -> None:
    rows = [row for row, _ in made]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = read(as_jsonl(folder / "rows.jsonl", rows))
        assert not any(isinstance(one, Problem) for one in expected), expected
        (folder / "rows.json").write_text(json.dumps(rows))
        assert read(folder / "rows.json") == expected
        assert read(as_parquet(folder / "rows.parquet", rows)) == expected
        assert read(as_folder(folder / "saved", rows)) == expected
        assert read(as_csv(folder / "rows.csv", rows)) == expected


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A row with one call, and the schema of its function alone."""
    sides = {key: {"type": type(value).__name__} for key, value in arguments.items()}
    function = {"name": name, "parameters": {"type": "object", "properties": sides}}
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"Use {name}."},
            {"role": "assistant", "content": "", "tool_calls": [made]},
        ],
        "tools": [{"type": "function", "function": function}],
    }


CALLS = [call("lamp", colour="red"), call("timer", seconds=9), call("stop")]


def hub_rows(rows: Any) -> Rows:
    return [row for _, row, _ in HubSet("hub:a/b", rows).rows() if isinstance(row, dict)]


def test_a_call_has_the_arguments_that_it_was_given(tmp_path: Path) -> None:
    expected = read(as_jsonl(tmp_path / "rows.jsonl", CALLS))
    assert [json.dumps(row["tools"]) for row in CALLS] == [
        json.dumps(chat.tools) for chat in expected if isinstance(chat, Chat)
    ]
    assert read(as_parquet(tmp_path / "rows.parquet", CALLS)) == expected
    assert read(as_folder(tmp_path / "saved", CALLS)) == expected


def test_rows_of_the_hub_have_no_nulls_of_arrow(tmp_path: Path) -> None:
    import datasets

    assert hub_rows(datasets.Dataset.from_list(CALLS)) == CALLS
    as_jsonl(tmp_path / "rows.jsonl", CALLS)
    loaded = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="c")
    assert hub_rows(loaded) == CALLS


def test_values_of_several_types_are_those_of_the_json_that_datasets_keeps(tmp_path: Path) -> None:
    import datasets

    rows = [call("lamp", to="red"), call("lamp", to=9), call("lamp", to=None)]
    rows[1]["messages"][0]["content"] = [{"type": "text", "text": "Use it."}]
    path = as_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir="c")
    assert "Json" in str(loaded.features)
    expected = read(path)
    assert hub_rows(loaded) == rows
    loaded.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == expected
    loaded.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == expected


def test_a_null_that_somebody_wrote_stays(tmp_path: Path) -> None:
    rows = [call("lamp", colour=None, steps=[1, None])]
    (chat,) = read(as_jsonl(tmp_path / "rows.jsonl", rows))
    assert isinstance(chat, Chat)
    arguments = chat.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"colour": None, "steps": [1, None]}
    (chat,) = read(as_parquet(tmp_path / "rows.parquet", rows))
    assert isinstance(chat, Chat)
    arguments = chat.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"steps": [1, None]}
    rows[0]["messages"] = json.dumps(rows[0]["messages"])
    (chat,) = read(as_parquet(tmp_path / "text.parquet", rows))
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"]["colour"] is None


def test_a_map_is_a_mapping_with_its_nulls(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    function = pa.struct({"name": pa.string(), "arguments": kind})
    message = pa.struct(
        {"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(function)}
    )
    written = {"name": "lamp", "arguments": [("colour", "red"), ("place", None)]}
    twice = {"name": "lamp", "arguments": [("colour", "red"), ("colour", "blue")]}
    chats = [[{"role": "assistant", "content": None, "tool_calls": [c]}] for c in (written, twice)]
    table = pa.table({"messages": pa.array(chats, pa.list_(message))})
    pq.write_table(table, tmp_path / "rows.parquet")
    made, problem = read(tmp_path / "rows.parquet")
    assert "row 2: has a map with a key twice: [('colour'," in str(problem)
    assert isinstance(made, Chat)
    arguments = made.messages[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"colour": "red", "place": None}


def test_a_date_among_arguments_is_refused_and_named(tmp_path: Path) -> None:
    rows = [call("book", day=datetime.date(2026, 1, 2))]
    (problem,) = read(as_parquet(tmp_path / "rows.parquet", rows))
    assert isinstance(problem, Problem)
    assert str(problem).startswith(
        "rows.parquet, row 1: a call of message 2: book.day is a date, which is not a JSON value;"
        " save it as text"
    )


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has the column 'text' twice"):
        read(tmp_path / "rows.parquet")


def test_an_arrow_file_is_read_with_and_without_its_index(tmp_path: Path) -> None:
    table = pa.table({"text": [f"paragraph {n}" for n in range(200)]})
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(tmp_path / "rows.arrow", table.schema) as writer:
            writer.write_table(table)
        texts = [one.text for one in read(tmp_path / "rows.arrow") if isinstance(one, Chat)]
        assert texts == table["text"].to_pylist()
    (tmp_path / "rows.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(DataError, match=r"rows\.arrow is not an Arrow file that can be read"):
        read(tmp_path / "rows.arrow")


def test_a_folder_that_datasets_divided_asks_for_one_of_its_splits(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="holds the splits test, train") as caught:
        read(tmp_path / "saved")
    assert caught.value.fix == f"name one of them in dataset.source: {tmp_path / 'saved/train'}"
    assert [one.text for one in read(tmp_path / "saved/train") if isinstance(one, Chat)] == ["a"]
