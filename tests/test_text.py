"""What hides is made visible, what is secret is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strixft.errors import DataError
from strixft.runs import write_json
from strixft.text import SECRET, redact, redact_all, visible

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


@pytest.mark.parametrize("key", KEYS)
def test_what_looks_like_a_key_is_left_out(key: str) -> None:
    text = redact(f"before {key} after")
    assert key not in text
    assert SECRET in text
    assert text.startswith("before ")
    assert text.rstrip('"').endswith(" after")


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "wandb_api_key", "DB_PASSWORD"])
def test_tokens_of_the_environment_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "plain words here")
    assert redact("it is plain words here, see") == f"it is {SECRET}, see"


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN", "short"), ("SSH_KEY_FILE", "long enough"), ("API_KEY", "/a/path/to/it")],
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
    monkeypatch.setenv("HF_TOKEN", "not-a-known-form")
    write_json(tmp_path / "a.json", {"url": "https://not-a-known-form@hub", "key": HUB_TOKEN})
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
