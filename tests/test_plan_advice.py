"""Several machines: each holds its share, and says what it sends."""

from typing import Any

import pytest
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS, Budget
from strixft.plan.advice import share_figures
from strixft.plan.choose import DataShape, Planner
from strixft.plan.result import plan_figures, require_fit
from strixft.probe.job import Job
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.support.errors import FitError, RecipeError
from strixft.support.units import GIB

HOST = HOSTS["strix-halo-128"]
CONFIG = AutoConfig.for_model(
    "llama",
    vocab_size=2000,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
DATA = DataShape(128)
RECIPE = Recipe(
    model="none",
    method="full",
    dataset=Dataset(source="none", max_length=128),
    train=Train(tokens_per_update=4096, compile="none"),
)


def shares(boxes: int, limit_bytes: int = 100 * GIB) -> dict[str, Any]:
    found = share_figures(Job.of(RECIPE, CONFIG, HOST), Budget(limit_bytes, "test"), DATA, boxes)
    return {share["way"]: share for share in found["shares"]}


def test_each_machine_does_its_share_of_an_update() -> None:
    alone = Planner(Job.of(RECIPE, CONFIG, HOST), DATA).choose(Budget(100 * GIB, "test")).run
    ddp = shares(4)["ddp"]
    rows = ddp["micro_batch_rows"] * ddp["gradient_accumulation_steps"]
    assert rows * 4 == alone.shape.rows * alone.steps


def test_fsdp_holds_a_part_of_what_ddp_holds_whole() -> None:
    found = shares(2)
    whole, part = found["ddp"], found["fsdp"]
    for name in ("weights", "adapter", "gradients", "optimizer"):
        assert part["parts"][name] == whole["parts"][name] // 2
    assert part["parts"]["activations"] == whole["parts"]["activations"]
    saved = sum(whole["parts"].values()) - sum(part["parts"].values())
    assert whole["device_bytes"] - part["device_bytes"] == pytest.approx(saved, abs=8)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_layers_and_what_is_outside_are_held_whole(method: str) -> None:
    recipe = RECIPE.model_copy(update={"method": method})
    limit = Budget(100 * GIB, "test")
    found = share_figures(Job.of(recipe, CONFIG, HOST), limit, DATA, 2)["shares"]
    (parts,) = (share["parts"] for share in found if share["way"] == "fsdp")
    whole = 2 * (parts["weights"] + parts["adapter"])
    outside = 2 * 2 * 2000 * 512  # embedding and head, in bf16
    assert parts["gathered"] == pytest.approx(2 * (whole - outside) / 8 + outside, rel=0.01)


def test_more_machines_hold_less_each() -> None:
    assert shares(8)["fsdp"]["device_bytes"] < shares(2)["fsdp"]["device_bytes"]


def test_a_ring_sends_nearly_twice_the_gradients() -> None:
    ddp = shares(4)["ddp"]
    trained = ddp["parts"]["adapter"]
    assert ddp["sent_bytes_per_update"] == 2 * trained * 3 // 4
    assert ddp["communication_seconds_per_update"] is None


def test_what_no_machine_holds_alone_fits_shared() -> None:
    alone = shares(2)["fsdp"]["device_bytes"]
    found = shares(4, alone)
    assert found["fsdp"]["fits"]
    assert found["fsdp"]["device_bytes"] <= alone


@pytest.mark.parametrize("boxes", [0, -1, 65])
def test_a_number_of_machines_that_is_none(boxes: int) -> None:
    with pytest.raises(RecipeError, match=f"--boxes should be 2 to 64, it is {boxes}"):
        shares(boxes)


def test_a_405b_over_two_boxes_gets_an_answer() -> None:
    overrides = {"model": "meta-llama/Llama-3.1-405B-Instruct"}
    recipe = load_recipe("llama-3.3-70b-qlora", overrides | {"train.micro_batch": 1})
    figures = plan_figures(recipe, "strix-halo-128", boxes=2)
    weights = {share["way"]: share["parts"]["weights"] for share in figures["boxes"]["shares"]}
    in_layers = 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248)
    nf4 = in_layers * (0.5 + 1 / 64 + 4 / (64 * 256))  # arXiv:2305.14314, section 3
    outside = 2 * 128256 * 16384 * 2
    assert weights["ddp"] == pytest.approx(nf4 + outside, rel=1e-3)
    assert weights["fsdp"] == weights["ddp"] // 2
    assert not figures["fits"]
    with pytest.raises(FitError, match=r"each of 2 machines needs .* by ddp and .* by fsdp"):
        require_fit(figures)
