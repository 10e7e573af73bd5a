"""Damaged data files, made from a seed: what people really have on their disks, and worse.

Each case writes one source and says what must happen: a row is left out with its number and a kind,
a row is used and somebody is told, nothing is wrong, or the whole source is refused.

    python tests/damage.py FOLDER     writes them all
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

SEED = 11
NUM_ROWS = 8
MIB = 2**20

Write = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """One damaged source."""

    name: str
    write: Write
    """Writes it into a folder and returns what the recipe should name."""
    bad: dict[int, str] = field(default_factory=dict)
    """Row → kind of problem: the row is left out."""
    noted: dict[int, str] = field(default_factory=dict)
    """Row → kind of problem: the row is used."""
    refused: str = ""
    """What the error says where the source as a whole is refused."""
    large: bool = False
    """It would take much memory if it were read carelessly."""


def good(number: int) -> dict[str, Any]:
    """A row with nothing wrong."""
    question = f"What is {number} times {number}?"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"It is {number * number}."},
        ]
    }


def goods(count: int = NUM_ROWS) -> list[bytes]:
    """Good rows as lines."""
    return [json.dumps(good(number)).encode() for number in range(1, count + 1)]


def _file(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write


def _at(place: int, line: bytes, end: bytes = b"\n") -> bytes:
    rows = goods()
    rows[place - 1] = line
    return end.join(rows) + end


def _chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def _turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, ANSWER = _turn("user", "Hello?"), _turn("assistant", "Hello.")


def _deep(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + b"1" + closing * depth


def _line_cases(rng: random.Random) -> list[tuple[str, bytes, str]]:
    """Lines of JSON with something wrong: name, line, kind."""
    whole = json.dumps(_chat(USER, ANSWER)).encode()
    cuts = [(f"cut-{n}", whole[: rng.randrange(1, len(whole) - 1)], "not_json") for n in range(8)]
    half = json.dumps(_chat(USER, _turn("assistant", "half \ud83d"))).encode()
    broken = [
        ("nan", whole.replace(b'"Hello."', b"NaN"), "not_json"),
        ("infinity", whole.replace(b'"Hello."', b"-Infinity"), "not_json"),
        ("single-quotes", str(_chat(USER, ANSWER)).encode(), "not_json"),
        ("trailing-comma", whole[:-1] + b",}", "not_json"),
        ("comment", b"// " + whole, "not_json"),
        ("two-objects", whole + whole, "not_json"),
        ("garbage-after", whole + b" and so on", "not_json"),
        ("key-twice", whole[:-1] + b', "messages": []}', "not_json"),
        ("huge-number", b'{"messages": ' + b"9" * 5000 + b"}", "not_json"),
        ("control-character", whole.replace(b"Hello.", b"Hel\x01lo."), "not_json"),
        ("null-bytes", b"\x00" * 40, "not_json"),
        ("deep-lists", _deep(b"[", b"]", 100_000), "not_json"),
        ("deep-objects", _deep(b'{"a":', b"}", 100_000), "not_json"),
        ("deep-in-messages", b'{"messages": ' + _deep(b"[", b"]", 5000) + b"}", "not_json"),
        ("html-line", b"<!DOCTYPE html><p>404", "not_json"),
        ("yaml-line", b"messages: [user, assistant]", "not_json"),
        ("half-character", half, "not_unicode"),
        (
            "half-in-question",
            half.replace(b'"user"', b'"x"')
            .replace(b'"assistant"', b'"user"')
            .replace(b'"x"', b'"assistant"'),
            "not_unicode",
        ),
        ("latin-1", whole.replace(b"Hello.", "Grüße.".encode("latin-1")), "not_utf8"),
        ("cut-character", whole.replace(b"Hello.", "€".encode()[:2]), "not_utf8"),
        ("overlong", whole.replace(b"Hello.", b"\xc0\xaf"), "not_utf8"),
        ("bytes-ff", whole.replace(b"Hello.", b"\xff\xfe\xfd"), "not_utf8"),
    ]
    scalars = [
        (f"a-{name}", value, "not_object")
        for name, value in (
            ("number", b"17"),
            ("text", b'"hello"'),
            ("null", b"null"),
            ("true", b"true"),
            ("list", b'[{"messages": []}]'),
        )
    ]
    return cuts + broken + scalars


def _row_cases() -> list[tuple[str, Any, str]]:
    """Objects that are no chats: name, row, kind."""
    no_messages: list[Any] = [7, None, {}, [], True, 1.5, "[", {"role": "user"}]
    wrong_types = [
        (f"messages-{type(value).__name__}-{n}", {"messages": value}, "no_messages")
        for n, value in enumerate(no_messages)
    ]
    contents = [
        (f"content-{n}", _chat(USER, _turn("assistant", value)), kind)
        for n, (value, kind) in enumerate(
            (
                (7, "not_text"),
                (True, "not_text"),
                ({"text": "x"}, "not_text"),
                ([7], "not_text"),
                ([{"type": "image_url", "image_url": {"url": "../../x.png"}}], "not_text"),
                ([{"type": "input_audio"}], "not_text"),
                (None, "no_text"),
                ("", "empty_turn"),
                (" \n\t ", "empty_turn"),
            )
        )
    ]
    roles = [
        (f"role-{n}", _chat(_turn(role, "Hello?"), ANSWER), kind)
        for n, (role, kind) in enumerate(
            (
                ("bot", "unknown_role"),
                ("User ", "unknown_role"),
                (3, "unknown_role"),
                (["user"], "unknown_role"),
                ("../../etc/passwd", "unknown_role"),
                ("<script>alert(1)</script>", "unknown_role"),
                (None, "bad_message"),
            )
        )
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": "{no json"}}
    shapes = [
        ("no-columns", {}, "no_messages"),
        ("other-columns", {"text": "hello"}, "other_format"),
        ("message-text", _chat("hello", "there"), "bad_message"),
        ("message-null", _chat(None), "bad_message"),
        ("no-answer", _chat(USER), "no_answer"),
        ("two-questions", _chat(USER, USER, ANSWER), "same_role_twice"),
        ("two-answers", _chat(USER, ANSWER, ANSWER), "same_role_twice"),
        ("empty-question", _chat(_turn("user", ""), ANSWER), "empty_turn"),
        ("untrained", _chat(USER, {**ANSWER, "train": False}), "nothing_to_train"),
        ("half-weight", _chat(USER, {**ANSWER, "weight": 0.5}), "bad_weight"),
        ("bad-call", _chat(USER, _turn("assistant", None, tool_calls=[call])), "bad_tool_call"),
        ("bad-tools", {**_chat(USER, ANSWER), "tools": "{no json"}, "bad_tools"),
    ]
    return wrong_types + contents + roles + shapes


def _odd_cases() -> list[tuple[str, Any, str | None]]:
    """Rows that are used, and of which some are noted: name, row, kind."""
    texts = {
        "right-to-left": ("\u202eevil\u202c and \u200fso on", "hidden_characters"),
        "byte-order-mark-inside": ("a\ufeffb", "hidden_characters"),
        "escape-sequence": ("\x1b[31mred\x1b[0m", "hidden_characters"),
        "null-inside": ("a\x00b", "hidden_characters"),
        "end-token-inside": ("Stop <|im_end|> here.", "special_token"),
        "key-inside": ("Use AKIAIOSFODNN7EXAMPLE now.", "secret"),
        "mail-inside": ("Write to anna.b@mail.org.", "email"),
        "phone-inside": ("Call +49 30 1234567 today.", "phone"),
        "html-inside": ("</pre></td></script><script>alert('x')</script>", None),
        "notebook-breaking": ("$\\frac{1}{0}$ ``` </body> <!-- {{ x }} {% raw %}", None),
        "arabic": ("مرحبا بالعالم", None),
        "emoji": ("👩‍👩‍👧‍👦 é\u0301", None),
        "template-words": ("{{ messages[0].content }}{% endfor %}", None),
        "path-leaving": ("../../../../etc/passwd", None),
        "long-word": ("x" * 3000, "too_long"),
    }
    return [
        (name, _chat(USER, _turn("assistant", text)), kind) for name, (text, kind) in texts.items()
    ]


def _packed(rows: bytes, how: str) -> bytes:
    return gzip.compress(rows) if how == "gz" else zstandard.compress(rows)


def _zeros(how: str, size: int) -> bytes:
    """A small file that unfolds to `size` bytes of one line."""
    if how == "gz":
        packer = zlib.compressobj(9, wbits=31)
        parts = [packer.compress(b"a" * MIB) for _ in range(size // MIB)]
        return b"".join([*parts, packer.flush()])
    return zstandard.ZstdCompressor(level=3).compress(b"a" * size)


def _wide_window() -> bytes:
    """A zst frame whose window is larger than a reader should keep."""
    settings = zstandard.ZstdCompressionParameters(window_log=30, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(b"\n".join(goods())) + packer.flush()


def _archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    rows = b"\n".join(goods())
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("../../rows.jsonl", rows)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            entry = tarfile.TarInfo("../../rows.jsonl")
            entry.size = len(rows)
            tar.addfile(entry, io.BytesIO(rows))
    return buffer.getvalue()


def _parquet(table: pa.Table, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **settings)
    return buffer.getvalue()


def _pairs_table(texts: list[Any]) -> pa.Table:
    return pa.table({"prompt": [f"q{i}" for i in range(len(texts))], "completion": texts})


def _bad_utf8_table() -> pa.Table:
    cells = [b"fine", b"bad \xff", b"fine too"]
    binary = pa.array(cells, pa.binary())
    offsets, data = binary.buffers()[1:]
    column = pa.StringArray.from_buffers(len(cells), offsets, data)
    return pa.table({"prompt": ["a", "b", "c"], "completion": column})


def _whole_file_cases(rng: random.Random) -> list[Case]:
    rows = b"\n".join(goods()) + b"\n"
    array = json.dumps([good(n) for n in range(1, NUM_ROWS + 1)]).encode()
    noise = rng.randbytes(5000)
    packed = {how: _packed(rows, how) for how in ("gz", "zst")}
    return [
        Case("empty", _file("empty.jsonl", b""), refused="is empty (0 bytes)"),
        Case("empty-array", _file("none.json", b"[]"), refused="holds no rows"),
        Case("blank", _file("blank.jsonl", b" \n\t\n\r\n"), refused="holds no rows"),
        Case("web-page", _file("page.jsonl", b"\n<!DOCTYPE html><html>"), refused="is a web page"),
        Case("xml", _file("x.json", b"<?xml version='1.0'?><rows/>"), refused="or XML"),
        Case(
            "lfs",
            _file("lfs.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            refused="git-lfs",
        ),
        Case("zip", _file("rows.zip.jsonl", _archive("zip")), refused="zip archive"),
        Case("tar", _file("rows.tar.jsonl", _archive("tar")), refused="tar archive"),
        Case("bz2", _file("rows.bz2.jsonl", bz2.compress(rows)), refused="bzip2"),
        Case("xz", _file("rows.xz.jsonl", lzma.compress(rows)), refused="with xz"),
        Case("pdf", _file("rows.pdf.txt", b"%PDF-1.7\n"), refused="PDF"),
        Case("sqlite", _file("rows.db.jsonl", b"SQLite format 3\0"), refused="SQLite"),
        Case("pickle", _file("p.jsonl", pickle.dumps([1], 4)), refused="never opened"),
        Case("utf-16", _file("u.jsonl", rows.decode().encode("utf-16")), refused="UTF-16"),
        Case("utf-16-be", _file("v.csv", b"\xfe\xff\x00a"), refused="UTF-16"),
        Case("noise", _file("noise.jsonl", b"{" + noise), refused="noise.jsonl, row 1"),
        Case("gz-cut", _file("c.jsonl.gz", packed["gz"][:-30]), refused="breaks off after row"),
        Case("zst-cut", _file("c.jsonl.zst", packed["zst"][:-30]), refused="after row"),
        Case(
            "gz-checksum",
            _file("k.jsonl.gz", packed["gz"][:-8] + b"\0" * 8),
            refused="breaks off after row",
        ),
        Case("gz-noise", _file("n.jsonl.gz", b"\x1f\x8b" + noise), refused="breaks off after row"),
        Case("zst-noise", _file("n.jsonl.zst", b"\x28\xb5\x2f\xfd" + noise), refused="after row"),
        Case("gz-empty", _file("e.jsonl.gz", gzip.compress(b"")), refused="is empty"),
        Case("gz-in-gz", _file("g.jsonl.gz", gzip.compress(packed["gz"])), refused="row 1"),
        Case(
            "gz-bomb", _file("b.jsonl.gz", _zeros("gz", 400 * MIB)), refused="as a bomb", large=True
        ),
        Case(
            "zst-bomb",
            _file("b.jsonl.zst", _zeros("zst", 400 * MIB)),
            refused="as a bomb",
            large=True,
        ),
        Case("zst-window", _file("w.jsonl.zst", _wide_window()), refused="breaks off", large=True),
        Case("array-cut", _file("a1.json", array[:-40]), refused="a1.json, row 8"),
        Case("array-comma", _file("a2.json", array.replace(b"}, {", b"} {", 1)), refused="row 1"),
        Case("array-tail", _file("a3.json", array + b" and more"), refused="row 8"),
        Case("array-text", _file("a4.json", array[:200]), refused="a4.json, row 2"),
        Case(
            "array-deep",
            _file("a5.json", b"[" + goods()[0] + b"," + b"[" * 100_000),
            refused="a5.json, row 2: is nested too deeply",
        ),
        Case(
            "array-element",
            _file("a6.json", b'[{"messages": "' + b"x" * (50 * MIB) + b'"}]'),
            refused="a6.json, row 1",
            large=True,
        ),
        Case(
            "held-in-a-key",
            _file("held.json", b'{"version": 1, "data": ' + array + b"}"),
            refused="holds its rows in 'data'",
        ),
        Case("unknown-columns", _file("o.jsonl", b'{"a": "b", "c": "d"}\n'), refused="row 1: no f"),
        Case(
            "ambiguous",
            _file("am.jsonl", b'{"text": "a", "prompt": "b", "completion": "c"}\n'),
            refused="row 1: the columns completion, prompt, text fit prompt-completion and text",
        ),
        Case("csv-header-only", _file("h.csv", b"prompt,completion\n"), refused="holds no rows"),
        Case("csv-column-twice", _file("t.csv", b"text,text\na,b\n"), refused="'text' twice"),
        Case(
            "csv-quote-never-closed",
            _file("q.csv", b'prompt,completion\nq1,a1\nq2,"a2\nq3,a3\nq4,a4\n'),
            refused="q.csv, row 3: has a quote that is never closed; the lines 4 to 5 after it",
        ),
        Case(
            "csv-quote-not-closed-in-a-row",
            _file("r.csv", b'prompt,completion\nq1,a1\nq2,"a2\n' + b"q3,a3\n" * (3 * MIB)),
            refused="r.csv, row 3: has a quote that is never closed; the lines 4 to",
            large=True,
        ),
        Case(
            "csv-long-line",
            _file("l.csv", b'prompt,completion\na,"' + b"x" * (50 * MIB)),
            refused="more than 16 MiB",
            large=True,
        ),
        Case("parquet-noise", _file("n.parquet", b"PAR1" + noise), refused="is not Parquet"),
        Case(
            "parquet-cut", _file("c.parquet", _parquet(_pairs_table(["a"]))[:-9]), refused="not Pa"
        ),
        Case("parquet-name", _file("j.parquet", rows), refused="is not Parquet"),
        Case(
            "parquet-bomb",
            _file(
                "b.parquet",
                _parquet(
                    _pairs_table(["x" * (40 * MIB)] * 3), compression="zstd", use_dictionary=False
                ),
            ),
            refused="as a bomb",
            large=True,
        ),
    ]


def _linked(folder: Path) -> Path:
    outside = folder.parent / "outside.jsonl"
    outside.write_bytes(goods()[0])
    inside = folder / "data"
    inside.mkdir()
    (inside / "train.jsonl").symlink_to(outside)
    return inside


def _broken_link(folder: Path) -> Path:
    inside = folder / "data"
    inside.mkdir()
    (inside / "train.jsonl").symlink_to(inside / "gone.jsonl")
    return inside


def _loop(folder: Path) -> Path:
    path = folder / "loop.jsonl"
    path.symlink_to(path)
    return path


def _pipe(folder: Path) -> Path:
    path = folder / "pipe.jsonl"
    os.mkfifo(path)
    return path


def _empty_folder(folder: Path) -> Path:
    path = folder / "data"
    path.mkdir()
    (path / "README.md").write_text("Nothing here.")
    return path


def _place_cases() -> list[Case]:
    return [
        Case("missing", lambda folder: folder / "gone.jsonl", refused="there is no data file"),
        Case("missing-up", lambda f: f / "../../gone/x.jsonl", refused="there is no data file"),
        Case("long-name", lambda f: f / ("x" * 400 + ".jsonl"), refused="cannot be found"),
        Case("no-match", lambda folder: folder / "*.jsonl", refused="no file matches"),
        Case("odd-pattern", lambda folder: folder / "[!]*", refused="no file matches"),
        Case("empty-folder", _empty_folder, refused="holds no data files"),
        Case("link-leaving", _linked, refused="is a link that leaves its folder"),
        Case("link-broken", _broken_link, refused="is not a regular file"),
        Case("link-loop", _loop, refused="loop.jsonl"),
        Case("pipe", _pipe, refused="is not a regular file"),
        Case("device", lambda folder: Path("/dev/zero"), refused="is not a regular file"),
    ]


def _table_cases() -> list[Case]:
    """CSV, Parquet, arrays and text with single rows wrong."""
    csv = b"prompt,completion\nq1,a1\n%s\nq3,a3\n"
    array = [json.dumps(good(n)).encode() for n in range(1, 4)]
    bad_array = [*array[:1], b'{"messages": "\xff"}', *array[1:]]
    text = b"One paragraph.\n\nBad \xff bytes.\n\nAnother one.\n"
    return [
        Case("csv-cells", _file("a.csv", csv % b"q2,a2,more"), bad={3: "bad_cells"}),
        Case("csv-few-cells", _file("b.csv", csv % b"q2"), bad={3: "bad_cells"}),
        Case("csv-bytes", _file("c.csv", csv % b"q2,\xff"), bad={3: "not_utf8"}),
        Case("csv-quote", _file("d.csv", csv % b'q2,"a"2'), bad={3: "not_csv"}),
        Case("csv-empty-cell", _file("e.csv", csv % b"q2,"), bad={3: "empty_turn"}),
        Case("csv-lines-in-cell", _file("f.csv", csv % b'q2,"a\n\nb"'), bad={}),
        Case("csv-semicolons", _file("g.csv", b"prompt;completion\nq;a, b\nq2;c\n"), bad={}),
        Case("tsv", _file("h.tsv", b"prompt\tcompletion\nq\ta, b\nq2\tc\n"), bad={}),
        Case(
            "array-bytes",
            _file("a.json", b"[" + b",\n".join(bad_array) + b"]"),
            bad={2: "not_utf8"},
        ),
        Case(
            "array-values",
            _file("b.json", b"[" + b",".join([array[0], b"7", b'{"x": NaN}', array[1]]) + b"]"),
            bad={2: "not_object", 3: "not_json"},
        ),
        Case(
            "array-numbers",
            _file("c.json", b"[" + array[0] + b", 12, 345]"),
            bad={2: "not_object", 3: "not_object"},
        ),
        Case("text-bytes", _file("t.txt", text), bad={3: "not_utf8"}),
        Case(
            "parquet-null",
            _file("a.parquet", _parquet(_pairs_table(["a", None, "c"]))),
            bad={2: "no_text"},
        ),
        Case(
            "parquet-numbers",
            _file("b.parquet", _parquet(_pairs_table([1, 2, 3]))),
            bad={1: "not_text", 2: "not_text", 3: "not_text"},
        ),
        Case("parquet-bytes", _file("c.parquet", _parquet(_bad_utf8_table())), bad={2: "not_utf8"}),
    ]


def _large_line_cases() -> list[Case]:
    huge = b'{"messages": "' + b"x" * (50 * MIB) + b'"}'
    return [
        Case("huge-line", _file("huge.jsonl", _at(4, huge)), bad={4: "too_large"}, large=True),
        Case(
            "huge-last-line",
            _file("last.jsonl", b"\n".join(goods()) + b"\n" + huge[:-2]),
            bad={NUM_ROWS + 1: "too_large"},
            large=True,
        ),
        Case(
            "huge-answer",
            _file(
                "answer.jsonl",
                _at(2, json.dumps(_chat(USER, _turn("assistant", "ab " * (4 * MIB)))).encode()),
            ),
            bad={},
            noted={2: "too_long"},
            large=True,
        ),
        Case(
            "huge-paragraph",
            _file("p.txt", b"One.\n\n" + (b"x y " * 60 + b"\n") * 2**17 + b"\nTwo.\n"),
            bad={3: "too_large"},
            large=True,
        ),
    ]


def _line_end_cases() -> list[Case]:
    rows = goods()
    mixed = b"".join(row + end for row, end in zip(rows, [b"\n", b"\r\n", b"\r"] * 3, strict=False))
    return [
        Case("bom", _file("bom.jsonl", b"\xef\xbb\xbf" + b"\n".join(rows))),
        Case("bom-inside", _file("bi.jsonl", b"\n\xef\xbb\xbf".join(rows))),
        Case("windows", _file("win.jsonl", b"\r\n".join(rows))),
        Case("old-mac", _file("mac.jsonl", b"\r".join(rows))),
        Case("mixed-ends", _file("mix.jsonl", mixed)),
        Case("blank-lines", _file("gaps.jsonl", b"\n\n \n".join(rows))),
        Case("mixed-ends-bad", _file("mb.jsonl", _at(3, b"{no", b"\r")), bad={3: "not_json"}),
        Case("jsonl-in-json", _file("lines.json", b"\n".join(rows))),
        Case("array-in-jsonl", _file("array.jsonl", b"[" + b",".join(rows) + b"]")),
        Case(
            "one-object",
            _file("one.json", json.dumps(good(3), indent=2).encode()),
        ),
    ]


def cases(seed: int = SEED) -> list[Case]:
    """All the cases, the same for the same seed."""
    rng = random.Random(seed)
    found = []
    for name, line, kind in _line_cases(rng):
        place = rng.randrange(2, NUM_ROWS + 1)
        how = rng.choice(("", "", "gz", "zst"))
        content = _at(place, line)
        file = f"{name}.jsonl" + (f".{how}" if how else "")
        write = _file(file, _packed(content, how) if how else content)
        found.append(Case(f"line-{name}", write, bad={place: kind}))
    for name, row, kind in _row_cases():
        place = rng.randrange(2, NUM_ROWS + 1)
        write = _file(f"{name}.jsonl", _at(place, json.dumps(row).encode()))
        found.append(Case(f"row-{name}", write, bad={place: kind}))
    for name, row, noted in _odd_cases():
        place = rng.randrange(2, NUM_ROWS + 1)
        write = _file(f"{name}.jsonl", _at(place, json.dumps(row).encode()))
        found.append(Case(f"odd-{name}", write, noted={place: noted} if noted else {}))
    found += _whole_file_cases(rng) + _table_cases() + _place_cases()
    return found + _large_line_cases() + _line_end_cases()


if __name__ == "__main__":
    for case in cases():
        target = Path(sys.argv[1], case.name)
        target.mkdir(parents=True)
        case.write(target)
