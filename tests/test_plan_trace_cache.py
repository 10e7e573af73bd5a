"""Traces on disk: the same again, made anew where they are damaged or anything changed."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS
from strixft.data.batches import RowShape
from strixft.plan import phase_peaks, scale, trace_cache
from strixft.plan.dry_run import Step
from strixft.plan.phase_peaks import PhasePeaks
from strixft.plan.scale import Regime, Traces
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Lora, Recipe, Train

HOST = HOSTS["strix-halo-128"]
CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
)
STEP = Step(RowShape(2, 64, 60), 0, 2)


EAGER = Train(compile="none")


def a_recipe(method: str = "lora", lora: Lora | None = None, train: Train = EAGER) -> Recipe:
    data = Dataset(source="none", packing=False)
    return Recipe(model="none", method=method, dataset=data, lora=lora or Lora(), train=train)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / trace_cache.FOLDER


def test_a_second_planner_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Traces(Job.of(a_recipe(), CONFIG, HOST)).dry_run(STEP)

    def refuse(*_: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(scale, "trace_run", refuse)
    again = Traces(Job.of(a_recipe(), CONFIG, HOST))
    assert again.dry_run(STEP) == first
    other = again.dry_run(Step(RowShape(4, 100, 90), 0, 1))
    assert other.peak_bytes > first.peak_bytes


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"places": []}', '{"places": [[1]]}'])
def test_a_damaged_file_is_made_anew(damage: str, cache: Path) -> None:
    first = Traces(Job.of(a_recipe(), CONFIG, HOST)).dry_run(STEP)
    whole = {file: file.read_text() for file in cache.glob("*.json")}
    assert len(whole) == 2
    for file in whole:
        file.write_text(damage)
    assert Traces(Job.of(a_recipe(), CONFIG, HOST)).dry_run(STEP) == first
    assert {file: file.read_text() for file in whole} == whole


@pytest.mark.parametrize("damage", ["", "{", "[]", "null"])
def test_a_number_is_found_once(damage: str, cache: Path) -> None:
    found = iter((7, 8))
    assert [trace_cache.number("forward", lambda: next(found)) for _ in range(2)] == [7, 7]
    (cache / "forward.json").write_text(damage)
    assert [trace_cache.number("forward", lambda: next(found)) for _ in range(2)] == [8, 8]


def test_a_forward_pass_is_planned_from_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.of(a_recipe(), CONFIG, HOST)
    run = Traces(job).dry_run(STEP)
    first = PhasePeaks(job, run)
    found = first.evaluate(4), first.generate(4)
    monkeypatch.setattr(phase_peaks, "forward_bytes", None)
    again = PhasePeaks(job, run)
    assert (again.evaluate(4), again.generate(4)) == found
    with pytest.raises(TypeError, match="not callable"):
        again.evaluate(2)


def test_a_cache_that_cannot_be_written_is_none(cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert Traces(Job.of(a_recipe(), CONFIG, HOST)).dry_run(STEP).peak_bytes > 0


@pytest.mark.parametrize(
    "changed",
    [
        (a_recipe(method="dora"), HOST),
        (a_recipe(lora=Lora(r=4, alpha=8)), HOST),
        (a_recipe(), HOSTS["v100-32"]),
    ],
    ids=["method", "rank", "host"],
)
def test_whatever_changes_a_trace_changes_its_name(changed: tuple[Recipe, Any]) -> None:
    regime = Regime.of(CONFIG, STEP.shape)
    recipe, host = changed
    names = {
        trace_cache.name_of(Job.of(a_recipe(), CONFIG, HOST), regime, ["kept"]),
        trace_cache.name_of(Job.of(recipe, CONFIG, host), regime, ["kept"]),
    }
    assert len(names) == 2


def test_what_does_not_change_a_trace_keeps_its_name() -> None:
    regime = Regime.of(CONFIG, STEP.shape)
    other = a_recipe(train=Train(compile="none", learning_rate=3e-4, epochs=7))
    assert trace_cache.name_of(
        Job.of(a_recipe(), CONFIG, HOST), regime, ["kept"]
    ) == trace_cache.name_of(Job.of(other, CONFIG, HOST), regime, ["kept"])
