"""Phases other than training: what the plan says is what the real parts hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from strixft.catalog.hosts import HOSTS
from strixft.data.batches import RowShape, shape_batch
from strixft.guard.host import find_host
from strixft.model.load import build, load_base
from strixft.model.source import load_config
from strixft.plan.dry_run import dry_run
from strixft.plan.phase_peaks import MERGED_BYTES, PROCESS, PhasePeaks, Tensors, kv_cache_bytes
from strixft.plan.result import plan_figures
from strixft.plan.trace import forward_bytes
from strixft.probe.job import Job
from strixft.recipe.load import load_recipe
from strixft.step.memory_tracker import MemoryTracker
from strixft.step.update import token_losses
from strixft.support.units import GIB

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 32,
}
LLAMA = {key: value for key, value in GEMMA.items() if key != "sliding_window"} | {
    "model_type": "llama"
}


@pytest.mark.parametrize("shape", [GEMMA, LLAMA], ids=["gemma", "llama"])
@pytest.mark.parametrize("tokens", [20, 100])
def test_the_cache_is_the_one_of_transformers(shape: dict[str, Any], tokens: int) -> None:
    config = AutoConfig.for_model(**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.ones(3, tokens - 1, dtype=torch.long), past_key_values=cache)
        model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    window_rest = 2 * 2 * 16 * 3 * 4 * 7  # a window's layer keeps one token less
    found = kv_cache_bytes(config, 3, tokens, 4)
    assert held <= found <= held + window_rest


@pytest.mark.parametrize("method", ["lora", "qlora", "int8-lora"])
def test_the_forward_pass_is_the_real_one(method: str, write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(method=method))
    shape = RowShape(3, 120, 200)
    planned = forward_bytes(Job.of(recipe, load_config(recipe), find_host("cpu")), shape)
    assert planned == pytest.approx(real_forward(build(recipe, "cpu", torch.float32)), rel=0.01)


def real_forward(model: nn.Module) -> int:
    tracker = MemoryTracker()
    tracker.watch_model(model)
    before = tracker.live_bytes
    with torch.no_grad(), tracker:
        token_losses(model, shape_batch(3, 120, 200, "cpu"))
    return tracker.peak_bytes - before


def test_every_phase_is_known(write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe()), "strix-halo-128")
    assert list(figures["phases"]) == [
        "load",
        "proof",
        "train",
        "evaluate",
        "generate",
        "merge",
        "export",
    ]
    for phase in figures["phases"].values():
        assert phase["device_bytes"] >= 0
        assert phase["host_bytes"] >= PROCESS.value
    assert figures["phases"]["train"]["device_bytes"] == figures["reserved_bytes"]


def test_a_70b_is_merged_within_16_gib() -> None:
    recipe = load_recipe("llama-3.3-70b-qlora")
    job = Job.of(recipe, load_config(recipe), HOSTS["strix-halo-128"])
    run = dry_run(job, RowShape(1, 64, 63), 80)
    life = PhasePeaks(job, run)
    assert Tensors.of(job).largest_linear == 8192 * 28672
    assert life.merge()["host_bytes"] > 8192 * 28672 * MERGED_BYTES
    assert life.merge()["host_bytes"] < 16 * GIB
    in_flight = 8192 * 28672 * (2 + 0.125)  # in bf16, and the scales of its blocks
    loaded = run.parts["weights"] + run.parts["adapter"]
    assert life.load()["device_bytes"] == loaded + in_flight
    assert life.load()["host_bytes"] < PROCESS.value + 3 * GIB  # a file that is written


class RealTracker(MemoryTracker):
    """Leaves out the shapes that transformers fills."""

    def watch(self, tensor: torch.Tensor, name: str) -> None:
        if not tensor.is_meta:
            super().watch(tensor, name)


@pytest.mark.parametrize("method", ["qlora", "int8-lora"])
def test_loading_holds_what_is_planned(
    method: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """On a CPU: the tensors alive while a checkpoint in bf16 is loaded in float32."""
    folder = tmp_path / "model"
    shape = LLAMA | {"hidden_size": 256, "intermediate_size": 1024}
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    recipe = load_recipe(write_recipe(model=str(folder), method=method))
    job = Job.of(recipe, config, find_host("cpu"))
    load_base(recipe, "cpu", torch.float32)  # tables of bitsandbytes are made once
    tracker = RealTracker()
    with tracker:
        model = load_base(recipe, "cpu", torch.float32)
    run = dry_run(job, RowShape(1, 64, 63))
    planned = PhasePeaks(job, run).load()["device_bytes"] - run.parts["adapter"]
    assert len(list(model.parameters())) > 8 * 7
    # when the last matrix of the feed-forward layers is in flight, one attention layer is to come
    assert 0.93 * planned < tracker.peak_bytes <= planned


def test_a_native_base_needs_no_second_copy_on_the_device(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe())
    job = Job.of(recipe, load_config(recipe), HOSTS["strix-halo-128"])
    run = dry_run(job, RowShape(1, 64, 63))
    loaded = run.parts["weights"] + run.parts["adapter"]
    assert PhasePeaks(job, run).load()["device_bytes"] == loaded
