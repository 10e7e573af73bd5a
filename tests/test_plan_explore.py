"""Answers for a slider: the exact one is the plan itself, the first one is near."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import WriteRecipe

from strixft.plan.bar import bar, columns
from strixft.plan.choose import DataShape
from strixft.plan.explore import Answer, Explorer, Settings, filled
from strixft.plan.result import plan_figures
from strixft.plan.scale import Traces
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.units import GIB


@pytest.fixture(scope="module")
def explorer(write_module_recipe: WriteRecipe) -> Explorer:
    """Answers for the tiny model on the machine that this is made for, without data."""
    memory = {"host": "strix-halo-128"}
    train = {"tokens_per_update": 4096}
    return Explorer(load_recipe(write_module_recipe(memory=memory, train=train)), None)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods and ranks that were traced since."""
    found: list[str] = []
    whole = Traces._trace

    def counted(self: Traces, *words: object) -> object:
        found.append("traced")
        return whole(self, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Traces, "_trace", counted)
    return found


def test_it_starts_at_the_plans_choice(explorer: Explorer) -> None:
    figures = plan_figures(explorer.recipe)
    found = explorer.exact(explorer.start)
    assert found.rows == figures["choice"]["micro_batch_rows"]
    assert found.need_bytes == figures["reserved_bytes"] + figures["outside_bytes"]
    assert found.parts == figures["parts"]
    assert found.tok_per_s == pytest.approx(figures["tok_per_s"])
    assert found.is_exact


@pytest.mark.parametrize(
    "change",
    [{"rows": 2}, {"length": 128}, {"rank": 16}, {"method": "qlora"}, {"method": "full"}],
    ids=str,
)
def test_an_exact_answer_is_the_plan_of_the_changed_recipe(
    explorer: Explorer, change: dict[str, object]
) -> None:
    settings = replace(explorer.start, **change)  # type: ignore[arg-type]
    figures = plan_figures(settings.applied(explorer.recipe))
    found = explorer.exact(settings)
    assert found.rows == figures["choice"]["micro_batch_rows"]
    assert found.need_bytes == figures["reserved_bytes"] + figures["outside_bytes"]


def test_a_first_answer_traces_nothing(explorer: Explorer, traced: list[str]) -> None:
    for change in ({"rows": 4}, {"rank": 32}, {"method": "int8-lora"}, {"method": "full"}):
        found = explorer.at_once(replace(explorer.start, **change))
        assert not found.is_exact
    assert traced == []


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_a_first_answer_for_rows_is_near(explorer: Explorer, rows: int) -> None:
    explorer.exact(explorer.start)
    settings = replace(explorer.start, rows=rows)
    first = explorer.at_once(settings)
    exact = explorer.exact(settings)
    assert first.need_bytes == pytest.approx(exact.need_bytes, rel=0.1)


def test_settings_become_overrides_that_give_the_same_recipe(
    explorer: Explorer, write_module_recipe: WriteRecipe
) -> None:
    settings = Settings(method="qlora", rank=64, length=128, epochs=2.5, rows=2)
    overrides = settings.overrides(explorer.recipe)
    assert overrides == {
        "method": "qlora",
        "lora.r": 64,
        "dataset.max_length": 128,
        "train.epochs": 2.5,
        "train.micro_batch": 2,
    }
    path = write_module_recipe(memory={"host": "strix-halo-128"}, train={"tokens_per_update": 4096})
    assert load_recipe(path, overrides) == settings.applied(explorer.recipe)
    assert Settings.of(explorer.recipe).overrides(explorer.recipe) == {}


def test_the_data_decide_the_time(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(memory={"host": "strix-halo-128"}), tmp_path / "run")
    explorer = Explorer(run.recipe, prepare_recipe(run))
    once = explorer.last
    assert once.updates
    twice = explorer.at_once(replace(explorer.start, epochs=2 * explorer.start.epochs))
    assert twice.updates == pytest.approx(2 * once.updates, abs=1)
    assert twice.seconds_total
    assert once.seconds_total
    assert twice.seconds_total > once.seconds_total


def test_rows_of_another_length_hold_the_same_tokens() -> None:
    packed = DataShape(512, [500] * 8, [250] * 8, [4] * 8, longest=128)
    shorter = filled(packed, 256)
    assert sum(shorter.lengths) == pytest.approx(4000, abs=256)
    assert sum(shorter.trained) == pytest.approx(2000, abs=128)
    assert max(shorter.lengths) == 256
    alone = DataShape(512, [100, 300, 500], [50, 150, 250])
    assert list(filled(alone, 320).lengths) == [100, 300], "longer rows are dropped"
    assert filled(packed, 512) is packed


def _answer(need: int, budget: int) -> Answer:
    settings = Settings(method="lora", rank=8, length=64, epochs=1, rows=None)
    return Answer(
        settings=settings,
        rows=1,
        recomputed_layers=0,
        parts={"weights": need - GIB, "activations": GIB // 2},
        beyond_bytes=GIB // 2,
        budget_bytes=budget,
        tok_per_s=100.0,
        seconds_per_update=658.0,
        updates=None,
        is_exact=True,
    )


def test_the_bar_says_it_in_one_sentence() -> None:
    assert "Fits: 98 of 109 GiB, 100 tokens/s, 10 min 58 s a step" in bar(
        _answer(98 * GIB, 109 * GIB)
    )
    over = bar(_answer(120 * GIB, 109 * GIB))
    assert "Does not fit: 120 of 109 GiB" in over
    assert 'class="sx-says no"' in over


def test_the_plans_choice_is_marked() -> None:
    choice = _answer(98 * GIB, 109 * GIB)
    other = replace(choice, settings=replace(choice.settings, rows=2))
    assert "plan ★" in bar(other, choice)
    assert "plan ★" not in bar(choice, choice)
    shown = columns({1: 50 * GIB, 2: 98 * GIB, 4: 130 * GIB}, 109 * GIB, now=1, chosen=2)
    assert "2★" in shown
    assert shown.count('class="over"') == 1
