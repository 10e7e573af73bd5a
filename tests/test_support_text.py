"""Hidden characters are made visible; secrets are left out."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest

from strixft.support.errors import DataError
from strixft.support.files import write_json
from strixft.support.text import SECRET, redact, redact_all, visible

HUB_TOKEN = "hf_" + "aB3" * 12
KEYS = [
    HUB_TOKEN,
    "sk-" + "x1" * 16,
    "ghp_" + "a1" * 20,
    "AKIA" + "A1" * 8,
    "-----BEGIN OPENSSH PRIVATE KEY-----",
    "api_key=abcdef123456789",
    '"password": "correct-horse-1"',
]


ORDINARY = [
    *("training", "Assistant", "experiment", "password123", "changeme", "minioadmin", "PRODUCTION"),
    *("llama-3.1", "batch_size", "aaaaaaaa", "--------------------", "20261130", "deadbeef"),
]
"""Values that people give a variable, and that texts contain by chance."""
LETTERS = string.ascii_letters + string.digits
RANDOM: dict[str, Callable[[Callable[[str, int], str]], str]] = {
    "hub": lambda draw: "hf_" + draw(string.ascii_letters, 34),
    "hex": lambda draw: draw("0123456789abcdef", 40),
    "short hex": lambda draw: draw("0123456789abcdef", 16),
    "uuid": lambda draw: "-".join(draw("0123456789abcdef", n) for n in (8, 4, 4, 4, 12)),
    "base 64": lambda draw: draw(LETTERS + "+/", 43) + "=",
    "gitlab": lambda draw: "glpat-" + draw(LETTERS + "-_", 20),
    "short": lambda draw: draw(LETTERS, 12),
    "pass phrase": lambda draw: " ".join(draw(string.ascii_lowercase, 6) for _ in range(4)),
}
"""Tokens as services make them."""


@pytest.mark.parametrize("kind", RANDOM)
def test_random_tokens_of_the_environment_are_left_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    values = [
        RANDOM[kind](lambda letters, count: "".join(generator.choices(letters, k=count)))
        for _ in range(500)
    ]
    kept = 0
    for value in values:
        monkeypatch.setenv("CI_TOKEN", value)
        kept += value in redact(f"it is {value}, see")
    assert kept <= len(values) / 100  # a short one may look like a word


@pytest.mark.parametrize("key", KEYS)
def test_what_looks_like_a_key_is_left_out(key: str) -> None:
    text = redact(f"before {key} after")
    assert key not in text
    assert SECRET in text
    assert text.startswith("before ")
    assert text.rstrip('"').endswith(" after")


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "wandb_api_key", "DB_PASSWORD"])
def test_tokens_of_the_environment_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "k7Qz-p0Wv-x3Lt")
    assert redact("it is k7Qz-p0Wv-x3Lt, see") == f"it is {SECRET}, see"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),
        *(("CI_TOKEN", value) for value in ORDINARY),
        ("SSH_KEY_FILE", "long enough"),
        ("API_KEY", "/a/path/to/it"),
    ],
)
def test_other_values_of_the_environment_stay(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}") == f"it is {value}"


def test_plain_data_are_redacted_to_the_last_text() -> None:
    data = {"a": [f"x {HUB_TOKEN}", 1, None], "b": {"c": (HUB_TOKEN,)}}
    assert redact_all(data) == {"a": [f"x {SECRET}", 1, None], "b": {"c": [SECRET]}}


def test_a_file_of_a_run_holds_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "n0t-4-kn0wn-f0rm")
    write_json(tmp_path / "a.json", {"url": "https://n0t-4-kn0wn-f0rm@hub", "key": HUB_TOKEN})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "url": f"https://{SECRET}@hub",
        "key": SECRET,
    }


def test_an_error_holds_no_token_and_no_control_characters() -> None:
    error = DataError(f"row 3: \x1b[2J\x1b]0;title\x07 {HUB_TOKEN}", fix=f"use {HUB_TOKEN}\u202e")
    assert HUB_TOKEN not in str(error)
    assert "\x1b" not in str(error)
    assert error.problem.startswith("row 3: ⟦U+001B⟧[2J")
    assert error.fix == f"use {SECRET}⟦U+202E⟧"


def test_lines_and_tabs_stay() -> None:
    assert visible("a\tb\nc – é 漢") == "a\tb\nc – é 漢"


def test_the_key_that_we_send_is_secret_even_if_it_is_made_of_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STRIXFT_API_KEY", "open-sesame-1234")
    monkeypatch.setenv("CI_TOKEN", "training")
    assert redact("training with open-sesame-1234") == "training with [secret]"
