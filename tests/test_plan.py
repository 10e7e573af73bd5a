"""The plan: what the dry run says is what the tracker counts over real tensors."""

from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe

from strixft.data import Batch, shape_batch
from strixft.errors import FitError, StageError
from strixft.guard import find_host
from strixft.hardware import HOSTS, Budget
from strixft.methods import METHODS
from strixft.model import build, load_config
from strixft.plan import DataShape, RowShape, choose, dry_run, plan_figures, plan_recipe
from strixft.prepare import prepare_recipe
from strixft.recipe import Recipe, load_recipe
from strixft.runs import open_run
from strixft.step import MemoryTracker, TrainingStep
from strixft.units import GIB


def real_batch(shape: RowShape) -> Batch:
    batch = shape_batch(shape.rows, shape.length, shape.trained, "cpu")
    batch["input_ids"].random_(0, 1000)
    batch["positions"].random_(0, shape.rows * (shape.length - 1))
    return batch


def measured(recipe: Recipe, shape: RowShape, recomputed_layers: int) -> tuple[int, int]:
    """Peak and resident bytes of two real updates on this CPU."""
    model = build(recipe, "cpu", torch.float32)
    step = TrainingStep(model, recipe.train, recomputed_layers=recomputed_layers)
    tracker = MemoryTracker()
    tracker.watch_model(model)
    batch = real_batch(shape)
    with tracker:
        for _ in range(2):
            step.update([batch])
    return tracker.peak_bytes, tracker.live_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recomputed_layers", [0, 2])
@pytest.mark.parametrize("shape", [RowShape(1, 16, 7), RowShape(3, 65, 192), RowShape(2, 257, 200)])
def test_the_dry_run_is_the_real_step(
    method: str, recomputed_layers: int, shape: RowShape, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(method=method))
    host = find_host("cpu")
    found = dry_run(recipe, load_config(recipe), host, shape, recomputed_layers)
    peak, resident = measured(recipe, shape, recomputed_layers)
    assert found.peak_bytes == pytest.approx(peak, rel=0.002)
    assert found.resident_bytes == pytest.approx(resident, rel=0.002)


def test_the_parts_add_up(write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe()), "h200-141")
    assert sum(figures["parts"].values()) == figures["peak_bytes"]
    assert all(isinstance(size, int) for size in figures["parts"].values())
    assert figures["parts"]["workspace"] > 0


def test_recomputing_saves_activations(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    config, host = load_config(recipe), find_host("cpu")
    kept, half, none = (
        dry_run(recipe, config, host, RowShape(4, 200, 400), layers).parts["activations"]
        for layers in (0, 1, 2)
    )
    assert kept > half > none


def test_the_largest_micro_batch_that_fits_is_chosen(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(train={"tokens_per_update": 1600}))
    config, host = load_config(recipe), find_host("cpu")
    data = DataShape(256, lengths=[100] * 1000, trained=[50] * 1000)
    peaks = {
        rows: dry_run(recipe, config, host, RowShape(rows, 100, rows * 50)).peak_bytes
        for rows in (8, 16)
    }
    roomy = choose(recipe, config, host, Budget(8 * GIB, "test"), data)
    tight = choose(recipe, config, host, Budget(peaks[8], "test"), data)
    assert (roomy.shape.rows, roomy.recomputed_layers) == (32, 0)
    assert (tight.shape.rows, tight.recomputed_layers) == (8, 0)


def test_an_update_has_the_tokens_that_the_recipe_asks_for(write_recipe: WriteRecipe) -> None:
    data = DataShape(256, lengths=[100] * 1000, trained=[30] * 1000)
    recipe = load_recipe(write_recipe(train={"tokens_per_update": 300}))
    assert data.rows_per_update(recipe) == 10


def test_auto_aims_at_two_hundred_updates(write_recipe: WriteRecipe) -> None:
    data = DataShape(256, lengths=[100] * 10_000, trained=[30] * 10_000)
    recipe = load_recipe(write_recipe(train={"tokens_per_update": "auto", "epochs": 2}))
    assert data.tokens_per_update(recipe) == 3000


def test_a_run_that_does_not_fit_says_what_helps(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    memory = {"host": "strix-halo-64", "reserve_gib": 61.99}
    run = open_run(write_recipe(memory=memory, train={"micro_batch": 4}), tmp_path / "run")
    with pytest.raises(StageError, match=r"stage prepare of .* has not run yet"):
        plan_recipe(run)
    prepare_recipe(run)
    plan = plan_recipe(run)
    with pytest.raises(
        FitError, match=r"needs 0\.\d+ GiB and strix-halo-64 has 0\.01 GiB"
    ) as caught:
        plan.require_fit()
    assert "--set train.micro_batch=auto" in caught.value.fix
    assert not run.is_done("plan")


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_has_a_budget(host: str, write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe(memory={"reserve_gib": 16})), host)
    assert figures["fits"]
    assert figures["host"]["name"] == host
    assert figures["host"]["source"]


def test_the_budget_of_a_strix_halo_is_109_gib(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(memory={"reserve_gib": 16}))
    assert plan_figures(recipe, "strix-halo-128")["host"]["budget_bytes"] == 109 * GIB
