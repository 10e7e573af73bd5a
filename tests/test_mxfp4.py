"""gpt-oss with experts in MXFP4, as its files have them, beside transformers' own reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sweep.inputs import write_folder
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

import strixft
from strixft.catalog.methods import METHODS
from strixft.model.load import load_base, shape_base
from strixft.model.packed_experts import packed_in
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.errors import RecipeError
from strixft.train.stage import ADAPTER

SIDES = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """A random model whose experts are in MXFP4."""
    folder = tmp_path / "gpt-oss"
    write_folder(folder, "gpt_oss", SIDES)
    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        shape = experts, outside, inside // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def by_transformers(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    for weight in model.parameters():
        weight.data = weight.data.float()  # transformers 5.17 leaves experts in bf16
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_it_is_what_transformers_reads(
    gpt_oss: Path, write_recipe: WriteRecipe, method: str
) -> None:
    recipe = load_recipe(write_recipe(model=str(gpt_oss), method=method))
    ours: Any = load_base(recipe, "cpu", torch.float32)
    assert len(packed_in(ours)) == (4 if method == "qlora" else 0)
    theirs, ids = by_transformers(gpt_oss), torch.arange(40)[None] % 29
    for name, weight in theirs.named_parameters():
        if name not in packed_in(ours):
            assert torch.equal(ours.get_parameter(name), weight), name
    for path, part in packed_in(ours).items():
        assert torch.equal(part.written_out(slice(None), torch.float32), theirs.get_parameter(path))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("method", "experts"), [("qlora", "shared"), ("lora", "all")])
def test_all_stages_run(
    gpt_oss: Path, write_recipe: WriteRecipe, tmp_path: Path, method: str, experts: str
) -> None:
    path = write_recipe(
        model=str(gpt_oss),
        method=method,
        lora={"r": 4, "alpha": 8, "experts": experts},
        train={"epochs": 1},
        evaluate={"max_rows": 1},
    )
    run = open_run(path, tmp_path / "run")
    for stage in ("prepare", "plan", "train", "evaluate"):
        getattr(strixft, f"{stage}_recipe")(run)
    strixft.export_recipe(run, ("merged",))
    base, ids = by_transformers(gpt_oss), torch.arange(40)[None] % 29
    tuned = PeftModel.from_pretrained(base, run.folder / "train" / ADAPTER).eval()
    with torch.no_grad():
        due = tuned(ids).logits
        merged = by_transformers(run.folder / "export/merged")(ids).logits
    assert float((merged - due).abs().max() / due.abs().max()) < 0.02  # it is written in bf16
    files = load_file(next((run.folder / "export/merged").glob("*.safetensors")))
    assert any(name.endswith("_blocks") for name in files) == (experts == "shared")


def test_the_plan_knows_its_size(gpt_oss: Path, write_recipe: WriteRecipe) -> None:
    sizes = {}
    for method in ("lora", "qlora"):
        recipe = write_recipe(model=str(gpt_oss), method=method)
        sizes[method] = plan_figures(load_recipe(recipe), "strix-halo-128")["parts"]["weights"]
    config = AutoConfig.from_pretrained(gpt_oss)
    whole = shape_base(config, METHODS["qlora"], torch.bfloat16)
    numbers = sum(part.shape.numel() for part in packed_in(whole).values())
    saved = 2 * numbers - numbers * 17 // 32
    assert abs(sizes["lora"] - sizes["qlora"] - saved) < 4 * 512  # the allocator rounds up


def test_no_method_that_would_be_refused_is_advised(
    gpt_oss: Path, write_recipe: WriteRecipe
) -> None:
    tight = {"host": "strix-halo-64", "reserve_gib": 61.9}
    train = {"micro_batch": 1024}
    recipe = write_recipe(model=str(gpt_oss), method="lora", memory=tight, train=train)
    figures = plan_figures(load_recipe(recipe))
    settings = [row["settings"].get("method") for row in figures["advice"]]
    assert "qlora" in settings
    assert "int8-lora" not in settings


def test_no_other_storage_is_made_of_it(gpt_oss: Path, write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(model=str(gpt_oss), method="int8-lora"))
    with pytest.raises(RecipeError, match="the weights are stored as mxfp4") as caught:
        load_base(recipe, "cpu", torch.float32)
    assert caught.value.fix == "method: qlora"
