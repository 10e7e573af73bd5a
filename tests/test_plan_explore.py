"""Sliders over a plan: each answer is the planner's own, and the picture needs no kernel."""

from pathlib import Path

import pytest
from conftest import WriteRecipe
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS, Budget
from strixft.plan.choose import DataShape, Planner
from strixft.plan.result import explore_plan
from strixft.plan.show import Explorer
from strixft.prepare.stage import prepare_recipe
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.run.open import open_run
from strixft.support.errors import StageError
from strixft.support.units import GIB

CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=5000,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def planner() -> Planner:
    train = Train(compile="none", tokens_per_update=4096)
    recipe = Recipe(model="none", method="lora", dataset=Dataset(source="none"), train=train)
    return Planner(Job.of(recipe, CONFIG, HOSTS["strix-halo-128"]), DataShape(512, longest=512))


def test_an_answer_is_the_planners(planner: Planner) -> None:
    found = Explorer(planner, Budget(GIB, "test")).answer(2, 512, 3)
    run = planner.dry_run(2, 3)
    assert found.peak_bytes == run.peak_bytes
    assert found.need_bytes == planner.need_bytes(run)
    assert run.seconds_per_update is not None
    assert found.tok_per_s == pytest.approx(2 * run.steps * 512 / run.seconds_per_update)


def test_shorter_rows_and_recomputed_layers_need_less(planner: Planner) -> None:
    explorer = Explorer(planner, Budget(GIB, "test"))
    needs = [
        explorer.answer(*sides).need_bytes for sides in ((8, 512, 0), (8, 256, 0), (8, 256, 6))
    ]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 3


def test_moving_a_slider_changes_the_answer(planner: Planner) -> None:
    explorer = Explorer(planner, Budget(GIB, "test"))
    rows, length, layers, shown = explorer.sliders().children
    assert shown.value == explorer.answer(1, 512, 0)._repr_html_()
    rows.value, length.value, layers.value = 4, 300, 5
    assert shown.value == explorer.answer(4, 300, 5)._repr_html_()


def test_a_move_is_answered_at_once_and_then_exactly(planner: Planner) -> None:
    explorer = Explorer(planner, Budget(GIB, "test"))
    rows, *_, shown = explorer.sliders().children
    seen: list[str] = []
    shown.observe(lambda change: seen.append(change["new"]), "value")
    rows.value = 8
    at_once, exactly = seen
    assert "at least" in at_once
    assert exactly == explorer.answer(8, 512, 0)._repr_html_()


@pytest.mark.parametrize("sides", [(2, 512, 3), (4, 300, 0), (8, 256, 6)])
def test_what_is_said_at_once_is_never_more(planner: Planner, sides: tuple[int, int, int]) -> None:
    explorer = Explorer(planner, Budget(GIB, "test"))
    least, exact = explorer.at_least(*sides), explorer.answer(*sides)
    assert 0.9 * exact.need_bytes < least.need_bytes <= exact.need_bytes
    assert least.tok_per_s == exact.tok_per_s


def test_whether_it_fits_goes_by_the_budget(planner: Planner) -> None:
    need = Explorer(planner, Budget(GIB, "test")).answer(4, 512, 0).need_bytes
    assert Explorer(planner, Budget(need, "test")).answer(4, 512, 0).fits
    assert not Explorer(planner, Budget(need - 1, "test")).answer(4, 512, 0).fits


def test_the_picture_stands_alone(planner: Planner) -> None:
    html = Explorer(planner, Budget(GIB, "test")).picture()
    assert html.startswith('<img class="sx" alt="memory against rows')


def test_sliders_need_prepared_data(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(), tmp_path / "run")
    with pytest.raises(StageError, match=r"stage prepare of .* has not run yet"):
        explore_plan(run)
    prepare_recipe(run)
    assert explore_plan(run).picture()
