"""The bench measures what it says, with rows that fit side by side."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from strixft.bench import run_bench, sets
from strixft.errors import StrixftError
from strixft.formats import FORMATS


def test_an_unknown_bench_is_told_with_the_known_ones() -> None:
    with pytest.raises(StrixftError, match="there is no bench 'date'") as caught:
        run_bench("date")
    assert caught.value.fix == "did you mean 'data'?"


def test_both_preparations_train_the_same_answers(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_bench("data", rows=40, repeat=1).rows
    assert capsys.readouterr().out == ""
    assert [(row["set"], row["preparation"].split(",")[0]) for row in rows] == [
        ("english", "strixft"),
        ("english", "TRL"),
        ("english", "TRL"),
        ("numbered", "strixft"),
        ("numbered", "TRL"),
        ("numbered", "TRL"),
        ("mixed lengths", "strixft"),
    ]
    for ours, theirs in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert ours["chats"] == theirs["chats"] == 40
        # the held-out rows are not among ours
        assert 0.8 < ours["trained_tokens"] / theirs["trained_tokens"] <= 1
        assert ours["chats_per_s"] > 0
        assert ours["cpu_ms_per_chat"] > 0


def test_the_chats_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rng = random.Random(1)
        sets.write_chats(tmp_path / name, 5, sets.numbered_words(rng), lambda: 30)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert FORMATS["messages"].name == "messages"


def test_english_chats_have_about_300_tokens(tmp_path: Path) -> None:
    import json

    rng, tokenizer = random.Random(0), sets.real_tokenizer()
    word = sets.real_words(rng, tokenizer)
    path = sets.write_chats(tmp_path / "x", 200, word, lambda: sets.lengths_alike(rng))
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in path.read_text().splitlines()
    ]
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / 200
    assert 280 < tokens < 360
