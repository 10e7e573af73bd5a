"""Which files a source means, and what they hold."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import strategies
import zstandard

from strixft.data.load import find_format, open_inputs, value_at
from strixft.data.readers import raw_rows
from strixft.formats.faults import RowFault
from strixft.formats.sources import SourceFile, find_files, fingerprint, ignored_files, resolve
from strixft.recipe.load import check_recipe, load_recipe
from strixft.recipe.schema import Dataset, Source
from strixft.support.errors import DataError, RecipeError

ROW = {"prompt": "q", "completion": "a"}


def write(path: Path, rows: int = 2, first: int = 0) -> Path:
    """JSON lines, every row its own."""
    lines = [
        json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) for n in range(first, first + rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def names(source: Path | str) -> list[str]:
    return [file.path.name for file in find_files(str(source))]


# Names.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("rows.jsonl", "{}/rows.jsonl"),
        ("data/rows.jsonl", "{}/data/rows.jsonl"),
        ("../rows.jsonl", "{up}/rows.jsonl"),
        ("/data/rows.jsonl", "/data/rows.jsonl"),
        ("data/*.jsonl", "{}/data/*.jsonl"),
        ("owner/name", "hub:owner/name"),
        ("hub:owner/name:subset", "hub:owner/name:subset"),
        ("folder", "{}/folder"),
        ("~nobody-at-all/x", "{}/~nobody-at-all/x"),
    ],
)
def test_a_source_is_a_path_beside_the_recipe_or_a_data_set_of_the_hub(
    source: str, found: str, tmp_path: Path
) -> None:
    assert resolve(source, tmp_path) == found.format(tmp_path, up=tmp_path.parent)


def test_a_folder_that_exists_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name", tmp_path) == str(tmp_path / "owner" / "name")


def test_a_recipe_may_name_several_sources_with_weights(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: m\ndataset: {source: [{source: a.jsonl}, {source: b, weight: 0.5}]}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.dataset.sources() == [str(tmp_path / "a.jsonl"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    "source", ["[]", "[{sorce: a}]", "[{source: a, weight: 0}]", "[{source: a, format: x}]", "7"]
)
def test_a_source_that_says_nothing_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: m\ndataset: {{source: {source}}}\n")
    with pytest.raises(RecipeError, match=r"dataset\.source"):
        load_recipe(tmp_path / "r.yaml")


def test_a_mapping_names_columns_of_a_format() -> None:
    with pytest.raises(
        RecipeError, match="'promt' is not a column of a format; did you mean 'prompt'"
    ):
        check_recipe(
            {"model": "m", "dataset": {"source": "x", "columns": {"promt": "a"}}}, name="r"
        )


# Files.


def test_a_folder_is_all_its_data_files_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", ".hidden.jsonl", "deep/.x/d.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("About.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [Path(name).name for name in ignored_files(str(tmp_path))] == [
        "README.md",
        "picture.png",
    ]


def test_a_pattern_is_the_files_that_match(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-2.jsonl", "test-1.jsonl", "deep/train-3.jsonl"):
        write(tmp_path / name)
    assert names(tmp_path / "train-*.jsonl") == ["train-1.jsonl", "train-2.jsonl"]
    assert names(tmp_path / "**" / "train-?.jsonl") == [
        "train-3.jsonl",
        "train-1.jsonl",
        "train-2.jsonl",
    ]


def test_a_file_with_signs_of_a_pattern_in_its_name_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "rows[1].jsonl")
    assert names(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl"]


def test_a_missing_file_is_told_with_the_near_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path / "trian.jsonl"))
    assert "did you mean 'train.jsonl'?" in caught.value.fix


def test_a_link_inside_its_folder_is_followed_and_one_named_itself_too(tmp_path: Path) -> None:
    real = write(tmp_path / "data" / "real.jsonl")
    (tmp_path / "data" / "link.jsonl").symlink_to(real)
    (tmp_path / "elsewhere.jsonl").symlink_to(real)
    assert names(tmp_path / "data") == ["link.jsonl", "real.jsonl"]
    assert names(tmp_path / "elsewhere.jsonl") == ["elsewhere.jsonl"]


def test_a_name_that_is_no_unicode_is_shown_escaped(tmp_path: Path) -> None:
    path = Path(str(tmp_path) + "/caf\udce9.jsonl")
    write(path)
    (file,) = find_files(str(path))
    assert file.name.endswith("caf\\udce9.jsonl")
    json.dumps(file.name, ensure_ascii=False).encode()


def test_one_file_is_known_by_its_hash_and_several_by_all_of_theirs(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl")
    alone, files = fingerprint([str(one)])
    assert alone == hashlib.sha256(one.read_bytes()).hexdigest() == files[0]["sha256"]
    assert files[0]["bytes"] == one.stat().st_size
    write(tmp_path / "b.jsonl", first=5)
    both, _ = fingerprint([str(tmp_path)])
    assert both != alone
    write(tmp_path / "b.jsonl", first=6)
    assert fingerprint([str(tmp_path)])[0] != both


# Rows.


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_packed_lines_are_read_whatever_they_are_called(how: str, tmp_path: Path) -> None:
    content = write(tmp_path / "plain.jsonl").read_bytes()
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[how]
    for name in (f"rows.jsonl{how}", "rows.data"):
        (tmp_path / name).write_bytes(packed)
        (file,) = find_files(str(tmp_path / name))
        assert [(n, row) for n, row, _ in raw_rows(file)] == [
            (1, {"prompt": "q0", "completion": "a0"}),
            (2, {"prompt": "q1", "completion": "a1"}),
        ]


def test_packed_in_several_frames_is_read_to_the_end(tmp_path: Path) -> None:
    lines = write(tmp_path / "plain.jsonl", rows=3).read_bytes().splitlines(keepends=True)
    skip = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    streaming = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    last = streaming.compress(lines[2]) + streaming.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(lines[0]) + skip + zstandard.compress(lines[1]) + last
    )
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    for file in find_files(str(tmp_path / "[ab].*")):
        assert [number for number, _, _ in raw_rows(file)] == [1, 2, 3]


def test_a_large_array_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "é" * (n * 37 % 5000)} for n in range(1500)]
    path = tmp_path / "big.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert path.stat().st_size > 5_000_000
    found = list(raw_rows(SourceFile(path, "json")))
    assert [row for _, row, _ in found] == rows
    assert [number for number, _, _ in found] == list(range(1, 1501))


def test_plain_text_is_read_by_paragraphs_from_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One\nand more.\n\n\nTwo.\n  \nThree.")
    (file,) = find_files(str(tmp_path / "book.txt"))
    assert [(n, row) for n, row, _ in raw_rows(file)] == [
        (1, {"text": "One\nand more."}),
        (5, {"text": "Two."}),
        (7, {"text": "Three."}),
    ]


def test_a_csv_row_is_numbered_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\nq1,"two\nlines"\nq2,a2\n')
    (file,) = find_files(str(tmp_path / "a.csv"))
    assert [number for number, _, _ in raw_rows(file)] == [2, 4]


@pytest.mark.parametrize("start", ["sep=;\n", '"sep=;"\r\n', "\ufeffSEP=;\n"])
def test_excels_line_on_what_divides_cells_is_no_header(start: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'{start}prompt;completion\nq, 1;"two\nlines"\n1,5;a\n', encoding="utf-8")
    assert [row[:2] for row in raw_rows(SourceFile(path, "csv"))] == [
        (3, {"prompt": "q, 1", "completion": "two\nlines"}),
        (5, {"prompt": "1,5", "completion": "a"}),
    ]


@pytest.mark.parametrize("text", ["null", "NA", "NaN", "None", "007", "1.50", "true", " x ", ""])
def test_a_cell_stays_the_text_that_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\nq,{text}\n")
    assert [row for _, row, _ in raw_rows(SourceFile(path, "csv"))] == [
        {"prompt": "q", "completion": text}
    ]


def test_a_space_before_a_quote_is_a_fault_and_one_in_a_text_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nq, "a"\nq, a "b"\nq," a"\nq, \n')
    found = [row for _, row, _ in raw_rows(SourceFile(path, "csv"))]
    assert isinstance(found[0], RowFault)
    assert found[0].problem == (
        "is not CSV: there is a space before the quotes of 'completion', which would then be part"
        " of its text"
    )
    assert [row["completion"] for row in found[1:] if isinstance(row, dict)] == [
        ' a "b"',
        " a",
        " ",
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_text_in_utf16_comes_with_a_command_that_converts_it(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nq,a\n", encoding=encoding)
    with pytest.raises(DataError, match="is UTF-16 text") as caught:
        list(raw_rows(SourceFile(path, "csv")))
    assert caught.value.fix is not None
    assert f"-t UTF-8 {path} > NEW" in caught.value.fix


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' appears twice in one object"),
        ('{"a": {"b": NaN}}', "NaN is not a JSON value"),
        ('{"a": -Infinity}', "-Infinity is not a JSON value"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
    ],
)
def test_json_that_a_decoder_would_change_is_refused(
    line: str, problem: str, tmp_path: Path
) -> None:
    for name, text in (("a.jsonl", line), ("a.json", f"[{line}]")):
        (tmp_path / name).write_text(text)
        (file,) = find_files(str(tmp_path / name))
        ((_, fault, _),) = raw_rows(file)
        assert isinstance(fault, RowFault)
        assert problem in fault.problem


def test_parquet_rows_are_numbered_by_their_position(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"messages": [[{"role": "user", "content": str(n)}] for n in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    (file,) = find_files(str(tmp_path / "a.parquet"))
    found = list(raw_rows(file))
    assert [number for number, _, _ in found] == list(range(1, 201))
    assert found[150][1] == {"messages": [{"role": "user", "content": "150"}]}


# Formats.


def test_every_file_has_a_format_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    inputs = open_inputs(Dataset(source=str(tmp_path)))
    assert [one.form.name for one in inputs] == ["prompt-completion", "question-answer"]


def test_preferences_are_not_mixed_with_chats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match="cannot be trained together") as caught:
        open_inputs(Dataset(source=str(tmp_path)))
    assert "dataset.format=chosen" in caught.value.fix


def test_an_ambiguous_row_asks_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t", "instruction": "i", "output": "o"}\n')
    (file,) = find_files(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError) as caught:
        find_format(file, "auto", {})
    assert caught.value.fix == "--set dataset.format=alpaca   or   --set dataset.format=text"
    assert find_format(file, "alpaca", {}).name == "alpaca"


def test_columns_that_fit_nothing_come_with_a_mapping_that_works(tmp_path: Path) -> None:
    row = {"id": "x", "task": "Add.", "runs": [{"input": "1, 2", "output": "3"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        open_inputs(Dataset(source=str(tmp_path / "a.jsonl")))
    mapping = caught.value.fix.split("dataset.columns=")[1].strip("'")
    assert mapping == "{instruction: task, output: runs.0.output, input: runs.0.input}"
    columns = dict(part.split(": ") for part in mapping.strip("{}").split(", "))
    (one,) = open_inputs(Dataset(source=str(tmp_path / "a.jsonl"), columns=columns))
    ((number, chat),) = strategies.read_rows(one)  # type: ignore[misc]
    assert number == 1
    assert [m["content"] for m in chat.messages] == ["Add.\n\n1, 2", "3"]


def test_a_column_that_a_mapping_uses_is_not_one_that_nothing_reads(tmp_path: Path) -> None:
    row = {"ask": "q", "runs": [{"output": "a"}], "id": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    columns = {"prompt": "ask", "completion": "runs.0.output"}
    (one,) = open_inputs(Dataset(source=str(tmp_path / "a.jsonl"), columns=columns))
    ((_, chat),) = [found for found in strategies.read_rows(one) if isinstance(found, tuple)]
    assert chat.unused == {"id"}
    assert [m["content"] for m in chat.messages] == ["q", "a"]


def test_a_first_row_without_a_chat_does_not_hide_the_format(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": None}), json.dumps({"messages": []})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (file,) = find_files(str(tmp_path / "a.jsonl"))
    assert find_format(file, "auto", {}).name == "messages"


def test_a_first_row_that_cannot_be_read_does_not_hide_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{no\n" + json.dumps(ROW) + "\n")
    (one,) = open_inputs(Dataset(source=str(tmp_path / "a.jsonl")))
    assert one.form.name == "prompt-completion"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b.0.c", 1),
        ("a.b.1", None),
        ("a.x", None),
        ("plain", 2),
        ("with.dot", 3),
        ("plain.more", None),
        ("", None),
    ],
)
def test_a_dotted_path_leads_into_a_row(path: str, value: object) -> None:
    row = {"a": {"b": [{"c": 1}]}, "plain": 2, "with.dot": 3}
    assert value_at(row, path) == value


def test_a_fault_keeps_its_words() -> None:
    assert str(RowFault("kind", "what")) == "what"


# The hub.


@pytest.fixture
def cached_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of the hub as its cache keeps it, after it was loaded once."""
    import datasets

    rows = write(tmp_path / "rows.jsonl", rows=300)
    made = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=tmp_path)
    folder = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    old = Path(made.cache_files[0]["filename"])
    old.rename(folder / "name-train.arrow")
    info = json.loads((old.parent / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "name"}
    info["splits"]["train"]["dataset_name"] = "name"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return "hub:owner/name"


def test_a_data_set_of_the_hub_is_read_from_its_cache_offline(cached_set: str) -> None:
    (one,) = open_inputs(Dataset(source=cached_set), offline=True)
    assert one.name == "hub:owner/name"
    assert one.form.name == "prompt-completion"
    rows = list(strategies.read_rows(one))
    assert [row[0] for row in rows if isinstance(row, tuple)] == list(range(1, 301))
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        open_inputs(Dataset(source=[Source(source=cached_set, split="tset")]), offline=True)
    assert "is 'tset' one of its splits" in caught.value.fix


def test_a_data_set_of_the_hub_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        open_inputs(Dataset(source="hub:nobody/nothing-at-all"), offline=True)
    assert caught.value.problem.startswith("the data set 'nobody/nothing-at-all' of the hub cannot")
    assert "is it a file? then correct its path" in caught.value.fix
