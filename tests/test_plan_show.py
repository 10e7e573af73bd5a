"""Pictures of the plan, and the cause and changes they show."""

from typing import Any

import pytest

from strixft.plan import show
from strixft.plan.advice import cause
from strixft.support.units import GIB

PARTS = {"weights": 40, "adapter": 1, "gradients": 1, "optimizer": 2, "activations": 50}


def point(rows: int, layers: int, need_gib: int, rate: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "recomputed_layers": layers,
        "need_bytes": need_gib * GIB,
        "tok_per_s": rate,
    }


@pytest.fixture
def figures() -> dict[str, Any]:
    """A plan that fits, with a frontier whose third point does not."""
    return {
        "fits": True,
        "host": {"budget_bytes": 109 * GIB},
        "parts": {name: size * GIB for name, size in PARTS.items()},
        "peak_bytes": 94 * GIB,
        "reserved_bytes": 96 * GIB,
        "outside_bytes": GIB,
        "tok_per_s": 80.0,
        "choice": {"micro_batch_rows": 1, "recomputed_layers": 0},
        "frontier": [point(1, 0, 97, 80.0), point(4, 80, 150, 75.0), point(2, 35, 108, 70.0)],
        "advice": [],
    }


def test_the_runner_up_is_the_fastest_other_plan_that_fits(figures: dict[str, Any]) -> None:
    assert show.runner_up(figures) == point(2, 35, 108, 70.0)
    figures["frontier"] = figures["frontier"][:2]
    assert show.runner_up(figures) is None


def test_each_picture_stands_alone(figures: dict[str, Any]) -> None:
    change = {"change": "--set method=qlora --set train.micro_batch=1", "setting": "method=qlora"}
    figures["advice"] = [change | {"peak_bytes": GIB, "seconds_per_update": 2.0, "fits": True}]
    for draw in (show.breakdown, show.frontier, show.advice):
        html = draw(figures)
        assert html.startswith('<img class="sx" alt="')
        assert 'src="data:image/png;base64,' in html


def test_what_is_not_known_is_not_drawn(figures: dict[str, Any]) -> None:
    assert show.advice(figures) == ""
    figures["frontier"] = [row | {"tok_per_s": None} for row in figures["frontier"]]
    assert show.frontier(figures) == ""


def test_the_cause_is_the_largest_part(figures: dict[str, Any]) -> None:
    assert cause(figures["parts"], 60 * GIB) == "most of it is activations, 50.00 GiB"
    assert cause({"weights": 141 * GIB}, 109 * GIB) == (
        "weights alone take 141.00 GiB, more than there is"
    )
