"""`--measure`: real steps of small models correct the plan, and are kept for the next one."""

from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from transformers import AutoConfig

from strixft.catalog.device_rates import cpu_name, write_rates
from strixft.catalog.hosts import HOSTS, Budget, Sourced
from strixft.data.batches import RowShape
from strixft.guard.host import find_host
from strixft.model.source import load_config
from strixft.plan.choose import DataShape, Planner
from strixft.plan.dry_run import DryRun, dry_run
from strixft.plan.measure import LAYERS, Correction, Line, load_correction, measure, save_correction
from strixft.plan.result import plan_figures
from strixft.probe.job import Job
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.support.errors import FitError, HostError, RecipeError
from strixft.support.units import GIB, MIB

HOST = HOSTS["strix-halo-128"]
ROOMY = Budget(4 * GIB, "test")
CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=2000,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rates() -> None:
    """Rates of this machine's processor."""
    rate = Sourced(value=1e10, mark="measured", source="test")
    write_rates(cpu_name(), bandwidth=rate, matmul={"float32": rate})


def a_recipe(**train: Any) -> Recipe:
    settings = Train(**{"compile": "none", **train})
    return Recipe(model="none", method="lora", dataset=Dataset(source="none"), train=settings)


def run_of(num_layers: int) -> DryRun:
    layers = list(range(num_layers))
    return dry_run(Job.of(a_recipe(), CONFIG, HOST), RowShape(4, 256, 900), layers=layers)


def test_a_measured_plan_says_so_and_the_next_one_uses_it(
    write_recipe: WriteRecipe, rates: None
) -> None:
    recipe = load_recipe(write_recipe(train={"micro_batch": 1}))
    before = plan_figures(recipe, "cpu")
    found = plan_figures(recipe, "cpu", measured=True)
    again = plan_figures(recipe, "cpu")
    assert again["seconds_per_update"] == found["seconds_per_update"]
    assert found["seconds_per_update"] != before["seconds_per_update"]
    told = [row for row in found["assumptions"] if "strixft plan --measure" in row["source"]]
    assert [row["mark"] for row in told] == ["measured"]
    assert (
        "memory was not measured: a CPU has no allocator to ask; the time was"
        in (found["warnings"])
    )
    assert found["peak_bytes"] == before["peak_bytes"]
    assert before["warnings"] == []


def test_a_measured_time_is_that_of_real_updates(rates: None) -> None:
    job, shape = Job.of(a_recipe(), CONFIG, find_host("cpu")), RowShape(2, 64, 100)
    planned = dry_run(job, shape)
    found = measure(job, ROOMY, planned)
    assert found.peak is None
    assert found.seconds is not None
    small = dry_run(job, shape, layers=range(LAYERS[1]))
    time = found.time(small.seconds_per_update, 1)
    assert time is not None
    assert time > 0
    assert str(LAYERS[0]) in found.source


def test_what_layers_take_more_counts_for_each_layer() -> None:
    """Two small models with 1 MiB more a layer and 3 MiB more in all say so of the deep one."""

    def real(run: DryRun) -> float:
        return run.peak_bytes + run.num_layers * MIB + 3 * MIB

    small, large, deep = map(run_of, (*LAYERS, CONFIG.num_hidden_layers))
    points = [(float(run.peak_bytes), real(run)) for run in (small, large)]
    found = Correction(peak=Line.through(*points)).of_run(deep)
    assert found.peak_bytes == pytest.approx(real(deep), abs=2**16)
    more = found.peak_bytes - deep.peak_bytes
    assert found.reserved_bytes - deep.reserved_bytes == more
    assert found.parts["workspace"] - deep.parts["workspace"] == more


def test_memory_is_never_corrected_to_less() -> None:
    run = run_of(4)
    assert Correction(peak=Line(0.9, -1e6)).of_run(run) == run


@pytest.mark.parametrize("far", [(4.0, 3.0), (2.0, 5.0)])
def test_noise_between_two_models_gives_no_line_that_falls(far: tuple[float, float]) -> None:
    line = Line.through((2.0, 3.0), far)
    assert line == Line(far[1] / far[0], 0.0)


def test_the_choice_goes_by_what_was_measured() -> None:
    data = DataShape(64, longest=64)
    job = Job.of(a_recipe(tokens_per_update=640), CONFIG, HOST)
    before = Planner(job, data)
    save_correction(job, Correction(Line(1.0, 50 * MIB), Line(2.0, 0.5), "a test"))
    after = Planner(job, data)
    old, new = before.dry_run(2, 0), after.dry_run(2, 0)
    assert new.peak_bytes == old.peak_bytes + 50 * MIB
    assert old.seconds_per_update is not None
    assert new.seconds_per_update == pytest.approx(2 * old.seconds_per_update + 0.5 * old.steps)
    assert after.candidate(2, 0).need_bytes == before.candidate(2, 0).need_bytes + 50 * MIB
    assert after.candidate(2, 0).seconds_per_update == new.seconds_per_update


@pytest.mark.parametrize("damage", ["", "[]", '{"peak": null}'])
def test_a_damaged_measurement_is_none(damage: str, cache: Path) -> None:
    job = Job.of(a_recipe(), CONFIG, HOST)
    path = save_correction(job, Correction(Line(1.0, 1.0), None, "a test"))
    assert load_correction(job).source == "a test"
    path.write_text(damage)
    assert load_correction(job) == Correction()


def test_another_machine_cannot_be_measured(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    with pytest.raises(RecipeError, match="it cannot measure strix-halo-128") as caught:
        plan_figures(recipe, "strix-halo-128", measured=True)
    assert caught.value.fix == "--host auto --measure"


def test_without_rates_there_is_nothing_to_correct() -> None:
    job = Job.of(a_recipe(), CONFIG, find_host("cpu"))
    run = dry_run(job, RowShape(1, 32, 20))
    with pytest.raises(HostError, match="no allocator to ask, and no rates") as caught:
        measure(job, ROOMY, run)
    assert "strixft bench gemm --host-row" in caught.value.fix


def test_small_models_that_do_not_fit_are_not_run(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    job = Job.of(recipe, load_config(recipe), find_host("cpu"))
    run = dry_run(job, RowShape(2, 64, 100))
    with pytest.raises(FitError, match=r"measuring with 2 layers needs .* GiB") as caught:
        measure(job, Budget(2**20, "test"), run)
    assert caught.value.fix == "--set train.micro_batch=1"
