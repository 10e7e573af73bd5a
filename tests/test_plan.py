"""The plan: what the dry run says is what the tracker counts over real tensors."""

from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteRecipe
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS, Budget
from strixft.catalog.methods import METHODS
from strixft.data.batches import Batch, PackedShape, RowShape, shape_batch, training_order
from strixft.guard.host import find_host
from strixft.model.load import build
from strixft.model.source import load_config
from strixft.plan.choose import AS_FAST, DataShape, Planner, choose
from strixft.plan.cost import Costs, Rates
from strixft.plan.dry_run import (
    DryRun,
    Schedule,
    Step,
    dry_run,
    rounded_all,
    run_schedule,
    trace_run,
)
from strixft.plan.result import plan_figures, plan_recipe
from strixft.plan.scale import Dims, Regime, Traces
from strixft.plan.trace import trace_step
from strixft.prepare.stage import prepare_recipe
from strixft.probe.job import Job
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.run.open import open_run
from strixft.step.memory_tracker import MemoryTracker
from strixft.step.update import TrainingStep
from strixft.support.errors import FitError, RecipeError, StageError
from strixft.support.units import GIB

SMALL_SIDES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = AutoConfig.for_model("llama", **SMALL_SIDES)
PACKED = RowShape(2, 128, 200, PackedShape(128, 5, 60))


def real_batch(shape: RowShape) -> Batch:
    batch = shape_batch(shape.rows, shape.length, shape.trained, "cpu", shape.packed)
    batch["input_ids"].random_(0, 1000)
    batch["positions"].random_(0, shape.rows * (shape.length - 1))
    if shape.packed is not None:
        ends = torch.linspace(0, shape.rows * shape.length, shape.packed.documents + 1)
        batch["cu_seq_lens"] = ends.int()
    return batch


def measured(recipe: Recipe, shape: RowShape, recomputed_layers: int) -> tuple[int, int]:
    """Peak and resident bytes of two real updates on this CPU."""
    model = build(recipe, "cpu", torch.float32)
    options = Job.of(recipe, load_config(recipe), find_host("cpu")).options_with(recomputed_layers)
    step = TrainingStep(model, recipe.train, options)
    tracker = MemoryTracker()
    tracker.watch_model(model)
    batch = real_batch(shape)
    with tracker:
        for _ in range(2):
            step.update([batch])
    return tracker.peak_bytes, tracker.live_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recomputed_layers", [0, 2])
@pytest.mark.parametrize(
    "shape", [RowShape(1, 16, 7), RowShape(3, 65, 192), RowShape(2, 257, 200), PACKED]
)
def test_the_dry_run_is_the_real_step(
    method: str, recomputed_layers: int, shape: RowShape, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(method=method))
    host = find_host("cpu")
    found = dry_run(Job.of(recipe, load_config(recipe), host), shape, recomputed_layers)
    peak, resident = measured(recipe, shape, recomputed_layers)
    more = 2**15 if method == "int8-lora" else 0  # its smallest case is 30 KiB high
    assert found.peak_bytes == pytest.approx(peak, rel=0.002, abs=more)
    assert found.resident_bytes == pytest.approx(resident, rel=0.002)


def test_the_parts_add_up(write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe()), "h200-141")
    assert sum(figures["parts"].values()) == figures["peak_bytes"]
    assert all(isinstance(size, int) for size in figures["parts"].values())
    assert figures["parts"]["workspace"] > 0


def test_recomputing_saves_activations(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    job = Job.of(recipe, load_config(recipe), find_host("cpu"))
    kept, half, none = (
        dry_run(job, RowShape(4, 200, 400), layers).parts["activations"] for layers in (0, 1, 2)
    )
    assert kept > half > none


def test_the_largest_micro_batch_that_fits_is_chosen(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(train={"tokens_per_update": 1600}))
    job = Job.of(recipe, load_config(recipe), find_host("cpu"))
    data = DataShape(256, lengths=[100] * 1000, trained=[50] * 1000)
    eight = dry_run(job, RowShape(8, 100, 400), steps=4)
    roomy = choose(job, Budget(8 * GIB, "test"), data).run
    tight = choose(job, Budget(eight.reserved_bytes, "test"), data).run
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


@pytest.mark.parametrize(("epochs", "tokens", "few"), [(1, "auto", 1), (99, "auto", 0), (1, 64, 0)])
def test_few_updates_are_said(
    write_recipe: WriteRecipe, tmp_path: Path, epochs: int, tokens: int | str, few: int
) -> None:
    train = {"epochs": epochs, "tokens_per_update": tokens}
    run = open_run(write_recipe(train=train), tmp_path / "run")
    found = plan_figures(run.recipe, prepared=prepare_recipe(run))
    said = f"only {found['updates']} updates, of at least a row each: more rows, or --set train."
    assert [text.startswith(said) for text in found["warnings"]] == [True] * few


@pytest.mark.parametrize("seed", range(40))
def test_every_micro_batch_of_training_is_within_the_planned_one(seed: int) -> None:
    rng = Random(seed)
    rows_in_all = range(rng.randrange(8, 60))
    documents, trained = ([rng.randrange(1, 20) for _ in rows_in_all] for _ in range(2))
    data = DataShape(64, [64] * len(documents), trained, documents, longest=60)
    epochs, rows = rng.choice([0.5, 1.0, 1.7, 3.0]), 2 ** rng.randrange(4)
    train = Train(epochs=epochs, tokens_per_update=rng.randrange(1, 200), seed=seed)
    recipe = Recipe(model="none", method="lora", dataset=Dataset(source="none"), train=train)
    order = training_order(trained, data.num_rows(recipe, rows), seed, rows)
    planned = data.largest(recipe, rows)
    assert planned.packed is not None
    padding = len(planned.packed.empty_row())
    first = [sum(trained[row] for row in order[at : at + rows]) for at in (0, rows)]
    assert first == sorted(first, reverse=True)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        assert sum(trained[row] for row in batch) <= planned.trained
        held = sum(documents[row] for row in batch) + (rows - len(batch)) * padding
        assert held <= planned.packed.documents


@pytest.mark.parametrize(("packing", "compiled"), [(True, True), (False, False)])
def test_layers_are_compiled_where_all_rows_have_one_length(packing: bool, compiled: bool) -> None:
    dataset = Dataset(source="none", packing=packing)
    recipe = Recipe(model="none", method="lora", dataset=dataset)
    assert Job.of(recipe, SMALL, HOSTS["strix-halo-128"]).options.compiled == compiled


def test_rows_are_not_packed_where_layers_carry_a_state() -> None:
    recipe = Recipe(model="none", method="lora", dataset=Dataset(source="none"))
    host = HOSTS["strix-halo-128"]
    assert Job.of(recipe, SMALL, host).options.backend.packed
    conv = AutoConfig.for_model("lfm2", **SMALL_SIDES, layer_types=["conv", "full_attention"])
    assert Job.of(recipe, conv, host).options.backend.packed  # it is told of documents
    sides = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
    mamba = AutoConfig.for_model("falcon_h1", **SMALL_SIDES, **sides)
    assert not Job.of(recipe, mamba, host).options.backend.packed


@pytest.mark.parametrize("layers", ["none", "layers"])
def test_mixtures_of_experts_are_planned(layers: Any) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **SMALL_SIDES, **experts, head_dim=16)
    train = Train(compile=layers)
    recipe = Recipe(model="none", method="lora", dataset=Dataset(source="none"), train=train)
    run = dry_run(Job.of(recipe, config, HOSTS["strix-halo-128"]), RowShape(1, 64, 63))
    assert run.parts["adapter"] > 0


def test_all_weights_are_not_trained_in_float16(write_recipe: WriteRecipe) -> None:
    with pytest.raises(RecipeError, match="in float16 on v100-32, which has no bf16") as caught:
        plan_figures(load_recipe(write_recipe(method="full")), "v100-32")
    assert caught.value.fix == "--set method=lora"


def test_a_run_that_does_not_fit_says_what_helps(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    memory = {"host": "strix-halo-64", "reserve_gib": 61}
    run = open_run(write_recipe(memory=memory, train={"micro_batch": 1024}), tmp_path / "run")
    with pytest.raises(StageError, match=r"stage prepare of .* has not run yet"):
        plan_recipe(run)
    prepare_recipe(run)
    plan = plan_recipe(run)
    with pytest.raises(
        FitError, match=r"needs \d+\.\d+ GiB and strix-halo-64 has 1\.00 GiB"
    ) as caught:
        plan.require_fit()
    assert "--set train.micro_batch=1 --set train.recompute=all" in caught.value.fix
    assert not run.is_done("plan")


LLAMA = {
    "model_type": "llama",
    "vocab_size": 200_000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 14,
    "head_dim": 16,
    "sliding_window": 32,
}
SHAPES = pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=["llama", "gemma"])
HOST = HOSTS["strix-halo-128"]


def a_recipe(method: str = "lora", **train: Any) -> Recipe:
    settings = Train(**{"compile": "none", **train})  # compiling takes seconds a trace
    return Recipe(model="none", method=method, dataset=Dataset(source="none"), train=settings)


@SHAPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("recomputed_layers", "steps"), [(0, 1), (3, 2), (8, 2)])
def test_stacked_layers_are_the_whole_model(
    shape: dict[str, Any], method: str, recomputed_layers: int, steps: int
) -> None:
    """A few layers, put together again, give every figure of all layers traced."""
    job, rows = Job.of(a_recipe(method), AutoConfig.for_model(**shape), HOST), RowShape(2, 64, 60)
    step = Step(rows, recomputed_layers, steps)
    stacked = trace_run(job, rows, recomputed_layers, steps)
    whole = Schedule(trace_step(job, rows, recomputed_layers, steps))
    ours, theirs = figures_of(stacked, step), figures_of(whole, step)
    assert ours.parts == pytest.approx(theirs.parts, rel=1e-3, abs=2**20)
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=1e-3)
    assert ours.reserved_bytes == pytest.approx(theirs.reserved_bytes, rel=0.02)
    assert ours.seconds_per_update == pytest.approx(theirs.seconds_per_update, rel=0.02)


def test_stacked_compiled_layers_are_the_whole_model() -> None:
    job = Job.of(a_recipe("qlora", compile="layers"), AutoConfig.for_model(**LLAMA), HOST)
    rows = RowShape(2, 64, 60, PackedShape(64, 5, 40))
    stacked = trace_run(job, rows, 3, 1)
    whole = Schedule(trace_step(job, rows, 3, 1))
    ours, theirs = (figures_of(trace, Step(rows, 3, 1)) for trace in (stacked, whole))
    assert ours.peak_bytes == pytest.approx(theirs.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [1_000, 32_000, 49_152, 131_072, 151_936, 262_144])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("beyond", [(), (False,), (True,), (True, False)])
def test_no_two_products_of_dimensions_grow_alike_between_two_samples(
    vocabulary: int, chunks: int, packed: bool, beyond: tuple[bool, ...], monkeypatch: Any
) -> None:
    windows = {(): (), (True, False): (1024, 4096)}.get(beyond, (512,))
    asked = SimpleNamespace(windows=windows, recurs=False, positions=None)
    monkeypatch.setattr("strixft.plan.scale.architecture_of", lambda _: asked)
    config = AutoConfig.for_model(**LLAMA | {"vocab_size": vocabulary})
    regime = Regime(False, beyond, chunks, packed)
    samples = regime.samples(config)
    assert [Regime.of(config, shape) for shape in samples] == [regime, regime]
    small, large = (Dims.of(shape, vocabulary) for shape in samples)
    growth = dict(zip(["1", "BT", "n", "m", "K", "BTT", "BTL", "TT", "B", "T"],
                      large.terms() / small.terms(), strict=True))  # fmt: skip
    same = [] if packed else ["BTL"]  # documents that share no row have no length of their own
    same += ["n", "m"] if chunks == 1 else []
    factors = sorted(factor for name, factor in growth.items() if name not in same)
    assert min(b / a for a, b in pairwise(factors)) > 1 + 1e-6


@SHAPES
@pytest.mark.parametrize("method", METHODS)
def test_a_trace_answers_for_other_micro_batches(shape: dict[str, Any], method: str) -> None:
    """A trace is scaled to the figures that a trace of that very step finds."""
    config, random = AutoConfig.for_model(**shape), Random(method)
    traces = Traces(Job.of(a_recipe(method), config, HOST))
    for _ in range(3):
        rows, length = random.choice([1, 2, 5]), random.choice([7, 32, 100, 257])
        trained = random.choice([rows, rows * length // 2 + 1, rows * length])
        layers = random.choice([0, 4, config.num_hidden_layers])
        step = Step(RowShape(rows, length, trained), layers, random.choice([1, 2, 4]))
        scaled, fresh = traces.dry_run(step), traces.fresh(step)
        assert scaled.peak_bytes == pytest.approx(fresh.peak_bytes, rel=1e-3), step
        one_segment = pytest.approx(fresh.reserved_bytes, rel=1e-3, abs=2**21)
        assert scaled.reserved_bytes == one_segment, step
        assert scaled.seconds_per_update == pytest.approx(fresh.seconds_per_update, rel=0.01)
        asked = traces.estimate(step).asked_bytes
        assert scaled.peak_bytes - scaled.unsplit_bytes == asked


@pytest.mark.parametrize("rows", [1, 5])
def test_a_trace_of_a_recurrence_answers_for_other_rows(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers loop over the chunks of a row: a trace is of the step's length, and none is needed."""
    kinds = ["linear_attention", "full_attention"] * 4
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sides = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
    shape = LLAMA | {"model_type": "qwen3_5_text", "num_hidden_layers": 8, "layer_types": kinds}
    config = AutoConfig.for_model(**shape | heads | sides)
    traces = Traces(Job.of(a_recipe(), config, HOST))
    for layers in (0, 3):
        step = Step(RowShape(rows, 150, rows * 90 + 1), layers, 2)
        fresh = traces.fresh(step)
        with monkeypatch.context() as patch:
            patch.delattr(Traces, "fresh")
            assert traces.dry_run(step) == fresh


def test_a_trace_of_compiled_layers_answers_for_other_micro_batches() -> None:
    wide = LLAMA | {"hidden_size": 1792, "intermediate_size": 4864, "num_attention_heads": 14}
    wide |= {"num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 2}
    config = AutoConfig.for_model(**wide)
    traces = Traces(Job.of(a_recipe("qlora", compile="layers"), config, HOSTS["h200-141"]))
    step = Step(RowShape(4, 2048, 8000, PackedShape(2048, 40, 1500)), 0, 1)
    scaled, fresh = traces.dry_run(step), traces.fresh(step)
    assert scaled.peak_bytes == pytest.approx(fresh.peak_bytes, rel=1e-3)
    assert scaled.seconds_per_update == pytest.approx(fresh.seconds_per_update, rel=0.01)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_no_other_choice_that_fits_is_faster_or_as_fast_and_smaller(method: str) -> None:
    data = DataShape(100, lengths=[100] * 60, trained=[50] * 60)
    recipe = a_recipe(method, tokens_per_update=400)
    wide = LLAMA | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 7}
    planner = Planner(Job.of(recipe, AutoConfig.for_model(**wide), HOST), data)
    steps = [planner.step(rows, layers) for rows in planner.rows() for layers in planner.layers()]
    runs = [planner.traces.dry_run(step) for step in steps]
    needs = sorted(map(planner.need_bytes, runs))
    assert len(set(needs)) > 20
    for limit in needs[:: len(needs) // 8]:
        fitting = [run for run in runs if planner.need_bytes(run) <= limit]
        chosen = planner.choose(Budget(limit, "test"))
        assert chosen.fits
        most = (1 + AS_FAST) * min(seconds_of(run) for run in fitting)
        assert seconds_of(chosen.run) <= most
        as_fast = [run for run in fitting if seconds_of(run) <= most]
        assert asked(chosen.run) == min(map(asked, as_fast))


def seconds_of(run: DryRun) -> float:
    assert run.seconds_per_update is not None
    return run.seconds_per_update


def asked(run: DryRun) -> int:
    return run.peak_bytes - run.unsplit_bytes


def figures_of(schedule: Schedule, step: Step) -> DryRun:
    trace = schedule.trace
    sizes = rounded_all(np.array([storage.num_bytes for storage in trace.storages]))
    seconds = Costs.of([cost for _, cost in trace.work]).seconds(Rates.of(HOST))
    return run_schedule(schedule, sizes, seconds, HOST, step)


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_has_a_budget(host: str, write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe(memory={"reserve_gib": 16})), host)
    assert figures["fits"]
    assert figures["host"]["name"] == host
    assert figures["host"]["source"]


def test_the_budget_of_a_strix_halo_is_109_gib(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(memory={"reserve_gib": 16}))
    assert plan_figures(recipe, "strix-halo-128")["host"]["budget_bytes"] == 109 * GIB
