"""Whatever a recipe or a data file holds, only errors of ours come out.

`STRIXFT_FUZZ` is the number of cases, 2,000 if it is not set: half recipes, half data files.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strixft.prepare.stage import prepare_data
from strixft.recipe.load import check_recipe, dump_recipe, load_recipe
from strixft.recipe.schema import explain
from strixft.support.errors import StrixftError

CASES = int(os.environ.get("STRIXFT_FUZZ", "2000"))
SETTINGS = settings(
    max_examples=CASES // 2,
    derandomize=CASES <= 2000,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
RECIPE = b"""\
model: embedded:smollm2-135m  # a comment
method: lora
dataset: {source: rows.jsonl, max_length: 64, validation_fraction: 0.2}
lora: {r: 4, alpha: 8, target_modules: [q_proj, v_proj]}
train:
  epochs: 1
  learning_rate: 1e-4
"""
KEYS = [key for key, _, _ in explain()]

texts = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            *("../../etc/passwd", "~nobody/x", "/dev/zero", "hub:a/..", "\0", "*", "[", "${HOME}"),
            *("auto", "all", "none", "<script>", "\x1b[2J", "!!python/object:os.system", "&a", "."),
        ]
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with stretches cut out, changed or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        data[at:end] = draw(st.binary(max_size=8) | texts.map(lambda text: text.encode()))
    return bytes(data)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A recipe with settings that are anything at all."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE)
    for _ in range(draw(st.integers(1, 4))):
        *sections, last = draw(st.sampled_from(KEYS) | texts).split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                break
        else:
            place[last] = draw(values)
    return yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")


def check_error(error: StrixftError) -> None:
    """An error says what is wrong and what to do, in text that can be printed."""
    assert error.problem
    assert error.fix
    assert "\x1b" not in str(error)


@SETTINGS
@given(
    text=st.one_of(edited(), mutated(RECIPE), st.binary(max_size=80)),
    overrides=st.dictionaries(st.sampled_from(KEYS) | texts, values, max_size=2),
)
def test_a_recipe_is_read_or_refused(text: bytes, overrides: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(text)
        try:
            recipe = load_recipe(path, overrides)
        except StrixftError as error:
            check_error(error)
            return
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"It is {number}."},
            ]
        }
        for number in range(count)
    ]


LINES = "".join(f"{json.dumps(row)}\n" for row in _rows(5)).encode()
TABLE = b"prompt,completion\n" + b"".join(b"What is %d?,It is.\n" % n for n in range(5))
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", ""]) | texts
turns = st.fixed_dictionaries({"role": roles, "content": texts | values})
chats = st.fixed_dictionaries({"messages": st.lists(turns, max_size=4)})
columns = st.sampled_from(
    [
        *("messages", "prompt", "completion", "text", "instruction", "output", "conversations"),
        *("chosen", "rejected", "tools", "label", "input", "question", "answer"),
    ]
)
rows = st.one_of(chats, st.dictionaries(columns, values, max_size=3), values)
lines = st.lists(rows, max_size=5).map(
    lambda found: "".join(f"{json.dumps(row)}\n" for row in [*_rows(2), *found]).encode()
)
files = st.one_of(
    st.tuples(st.just(".jsonl"), lines | mutated(LINES)),
    st.tuples(st.just(".json"), st.lists(rows, max_size=4).map(lambda r: json.dumps(r).encode())),
    st.tuples(st.sampled_from([".csv", ".tsv"]), mutated(TABLE)),
    st.tuples(st.sampled_from([".txt", ".parquet", ".jsonl"]), st.binary(max_size=200)),
    st.tuples(st.just(".jsonl.gz"), lines.map(gzip.compress).flatmap(mutated)),
    st.tuples(
        st.just(".jsonl.zst"), lines.map(zstandard.ZstdCompressor().compress).flatmap(mutated)
    ),
)
policies = st.fixed_dictionaries(
    {
        "too_long": st.sampled_from(["drop", "truncate", "split", "error"]),
        "max_bad_fraction": st.sampled_from([0, 0.5, 1]),
        "personal_data": st.sampled_from(["report", "mask", "drop"]),
        "max_length": st.sampled_from([8, 64]),
        "format": st.sampled_from(["auto", "messages", "prompt-completion", "text"]),
    }
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def _known(policy: dict[str, Any]) -> dict[str, Any]:
    from strixft.formats.known_formats import FORMATS

    known = policy["format"] == "auto" or policy["format"] in FORMATS
    return policy if known else {**policy, "format": "auto"}


@SETTINGS
@given(file=files, policy=policies)
def test_data_are_prepared_or_refused(
    tokenizer: Any, file: tuple[str, bytes], policy: dict[str, Any]
) -> None:
    ending, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows{ending}")
        path.write_bytes(content)
        dataset = {"source": str(path), "validation_fraction": 0.2, **_known(policy)}
        recipe = check_recipe({"model": "m", "dataset": dataset}, name="fuzz")
        out = Path(folder, "out")
        out.mkdir()
        try:
            _, figures = prepare_data(recipe, out, tokenizer)
        except StrixftError as error:
            check_error(error)
            return
        assert figures["rows_read"] >= figures["rows_bad"]
