"""What the plan predicts stands in a table, and one recipe that fails does not hide the others."""

from __future__ import annotations

from typing import Any

import pytest

from strixft.bench import page
from strixft.bench.page import HEADER, predict_training
from strixft.plan.result import plan_figures


def test_recipes_are_planned_for_a_host_and_a_failure_is_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = plan_figures

    def plan(recipe: Any, host: str) -> Any:
        if recipe.model.startswith("meta-llama"):
            raise RuntimeError("no such operator\nat line 1")
        return real(recipe, "cpu")

    monkeypatch.setattr(page, "plan_figures", plan)
    html = predict_training(["demo", "llama-3.1-8b-lora"])
    assert "not planned: no such operator<" in html
    assert html.count(">predicted<") == 1
    assert html.count("<td>") == 2 * len(HEADER)
