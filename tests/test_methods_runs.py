"""Whole runs of methods beside plain LoRA: resumed, merged, exported, trained on."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe, chats
from safetensors.torch import load_file
from test_train import ALONE, LONG, assert_equal_bit_for_bit, end_and_finish, trained
from transformers import AutoModelForCausalLM

from strixft.export.stage import export_recipe
from strixft.plan.exportable import require_kinds
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.servers.gguf import _scaled_by_rank
from strixft.support.errors import RecipeError, StageError
from strixft.train.stage import ADAPTER

EVERYTHING: dict[str, Any] = {
    "lora": {
        "r": 16,
        "rs": True,
        "dropout": 0.2,
        "layers": [1],
        "modules_to_save": ["embed_tokens"],
    },
    "train": {"optimizer": "adamw-8bit", "lora_plus_ratio": 4, "max_steps": 12},
}


def adapter_of(run: Run) -> Path:
    return run.folder / "train" / ADAPTER


def test_everything_at_once_goes_on_bit_for_bit_and_merges(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    from peft import PeftModel

    train = {**LONG, "recompute": 1, **EVERYTHING["train"]}
    recipe = write_recipe(rows=chats(40), dataset=ALONE, **{**EVERYTHING, "train": train})
    undisturbed = open_run(recipe, tmp_path / "whole")
    plan, result = trained(undisturbed)
    assert result.figures["updates"] == plan.figures["updates"] == 12
    assert result.figures["peak_bytes"] == pytest.approx(plan.figures["peak_bytes"], rel=0.01)
    run, _ = end_and_finish(recipe, tmp_path / "run", signal.SIGKILL)
    assert_equal_bit_for_bit(run, undisturbed)
    made = export_recipe(run, ("merged",)).figures["made"]["merged"]["check"]
    assert made["exact"]
    assert made["learned_kl"] > 1e-6
    folder = run.folder / "export" / "merged"
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored  # the base is tied, and so is the result
    base = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model, dtype=torch.float32)
    plain: Any = PeftModel.from_pretrained(base, adapter_of(run)).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(100, 140).view(1, 40)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (merged, plain))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_trained_on(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    first = open_run(write_recipe("first"), tmp_path / "first")
    _, before = trained(first)
    path = write_recipe("second", init_from=str(first.folder), train={"learning_rate": 1e-6})
    second = open_run(path, tmp_path / "second")
    _, after = trained(second)
    assert after.figures["losses"][0] < before.figures["losses"][0]
    ours, theirs = (load_file(adapter_of(r) / "adapter_model.safetensors") for r in (second, first))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert after.figures["proof"]["difference"] < 1e-4  # before the adapter is there
    for settings, told, fix in (
        ({"lora": {"r": 8}}, "lora.r is 8 here and 4 there", {"lora.r": 4}),
        ({"method": "dora"}, "method is 'dora' here", {"method": "lora"}),
    ):
        other = load_recipe(write_recipe("other", init_from=str(first.folder), **settings))
        with pytest.raises(RecipeError, match=told) as caught:
            plan_figures(other, "h200-141")
        assert caught.value.settings == fix


def test_runs_that_cannot_be_trained_on_are_told(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no run 'nowhere'"):
        load_recipe(write_recipe(init_from="nowhere"))
    bare = open_run(write_recipe("bare"), tmp_path / "bare")
    with pytest.raises(StageError, match="is not trained"):
        plan_figures(load_recipe(write_recipe(init_from=str(bare.folder))), "h200-141")
    whole = open_run(write_recipe("whole", method="full"), tmp_path / "whole")
    with pytest.raises(RecipeError, match="there is no adapter"):
        plan_figures(load_recipe(write_recipe(init_from=str(whole.folder))), "h200-141")


def test_a_gguf_adapter_is_scaled_as_it_was_trained(tmp_path: Path) -> None:
    """llama.cpp scales by alpha / r, whatever `use_rslora` says."""
    said = {"use_rslora": True, "r": 16, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with _scaled_by_rank(tmp_path) as view:
        found = json.loads((view / "adapter_config.json").read_text())
        assert {file.name for file in view.iterdir()} == {file.name for file in tmp_path.iterdir()}
    assert found["lora_alpha"] / found["r"] == 8 / math.sqrt(16)


def test_a_gguf_adapter_holds_no_whole_modules(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(lora={"modules_to_save": ["lm_head"]}))
    with pytest.raises(StageError, match="cannot hold lm_head") as caught:
        require_kinds(recipe, ["gguf-lora"])
    assert caught.value.fix == "--to gguf"


@pytest.mark.parametrize(
    ("method", "name", "told"),
    [
        ("lora", "lm_haed", "no module 'lm_haed'"),
        ("lora", "mlp", "other modules inside"),
        ("qlora", "o_proj", "in few bits"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_told(
    method: str, name: str, told: str, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(method=method, lora={"modules_to_save": [name]}))
    with pytest.raises(RecipeError, match=told):
        plan_figures(recipe, "h200-141")
