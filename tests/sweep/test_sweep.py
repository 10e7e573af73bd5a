"""Two types of the sweep, a wrapper and one whose layers carry a state, and the page of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.__main__ import PAGE
from sweep.models import REFUSED, SWEPT
from sweep.run import sweep, verdict


@pytest.mark.parametrize("name", ["mistral3", "nemotron_h"])
def test_a_type_goes_through_every_stage(name: str, tmp_path: Path) -> None:
    found = sweep(name, SWEPT[name], tmp_path)
    assert verdict(found) is None
    assert found.gaps.keys() == {"first loss", "losses", "adapter", "merged"}
    assert found.packed is (name == "mistral3")


def test_a_refusal_is_one_sentence(tmp_path: Path) -> None:
    found = sweep("deepseek_v32", SWEPT["deepseek_v32"], tmp_path)
    assert verdict(found) is None
    assert found.stage == "plan"


def test_the_page_has_every_type() -> None:
    lines = PAGE.read_text().splitlines()
    for name in SWEPT:
        line = next(line for line in lines if line.startswith(f"| {name} |"))
        outcome = line.split(" | ")[2]
        assert outcome.startswith("refused: ") is (name in REFUSED), name
