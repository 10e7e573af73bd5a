"""Models that cannot be trained: each says what is known, what was tried, and what to type."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WriteRecipe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from strixft.model.adapter import load_adapter
from strixft.model.architecture import architecture_of
from strixft.model.load import load_base
from strixft.model.source import load_config, load_tokenizer
from strixft.plan.result import plan_figures
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.errors import DataError, RecipeError, StageError

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
}  # fmt: skip
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, **settings: Any) -> None:
    """Change settings of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(folder: Path, name: Callable[[str], str]) -> None:
    """Rename the weights of a checkpoint."""
    path = folder / "model.safetensors"
    save_file({name(key): w for key, w in load_file(path).items()}, path, {"format": "pt"})


def test_a_type_that_is_not_known_names_the_version(model: Path, write_recipe: WriteRecipe) -> None:
    change(model, model_type="qwen9", architectures=["Qwen9ForCausalLM"])
    version = transformers.__version__
    with pytest.raises(RecipeError, match=rf"transformers {version} does not know .* 'qwen9'") as e:
        load_config(load_recipe(write_recipe(model=str(model))))
    assert "did you mean 'qwen3'?" in e.value.fix
    assert "pip install --upgrade strixft" in e.value.fix


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple of the number of"),
        ({"layer_types": ["foo", "full_attention"]}, "`layer_types` entries must be in"),
    ],
)
def test_a_class_that_raises_is_told_by_the_first_stage(
    settings: dict[str, Any], words: str, model: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    change(model, **settings)
    run = open_run(write_recipe(model=str(model)), tmp_path / "run")
    with pytest.raises(RecipeError, match=words) as caught:
        prepare_recipe(run)
    assert caught.value.fix == f"correct {model}/config.json"


def test_sizes_that_only_running_contradicts(model: Path, write_recipe: WriteRecipe) -> None:
    sides = {"num_local_experts": 4, "num_experts_per_tok": 9}
    change(model, model_type="mixtral", architectures=["MixtralForCausalLM"], **sides)
    with pytest.raises(RecipeError, match=r"its code fails without weights: .*range") as caught:
        plan_figures(load_recipe(write_recipe(model=str(model))), "strix-halo-128")
    assert caught.value.fix.startswith("correct config.json if its sizes contradict each other")


def test_a_checkpoint_whose_names_are_not_those_of_its_class(
    model: Path, write_recipe: WriteRecipe
) -> None:
    rename(model, lambda name: name.replace("model.layers", "transformer.h"))
    with pytest.raises(RecipeError) as caught:
        load_base(load_recipe(write_recipe(model=str(model))), "cpu", torch.float32)
    assert "model.layers.0.self_attn.q_proj.weight and 17 more" in caught.value.problem
    assert "no part of a LlamaForCausalLM is transformer.h.0." in caught.value.problem


@pytest.mark.parametrize("text", [None, {}])
def test_a_wrapper_without_its_text_part(text: Any, model: Path, write_recipe: WriteRecipe) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    with pytest.raises(RecipeError, match="text_config is missing: a gemma3 has its text model"):
        load_config(load_recipe(write_recipe(model=str(model))))


def test_a_wrapper_may_hold_its_text_sides_itself(model: Path, write_recipe: WriteRecipe) -> None:
    """As Qwen/Qwen2-VL-2B-Instruct does."""
    config = {"model_type": "qwen2_vl", **TEXT, "vision_config": {"depth": 1}}
    (model / "config.json").write_text(json.dumps(config))
    read = load_config(load_recipe(write_recipe(model=str(model))))
    assert read.get_text_config().hidden_size == TEXT["hidden_size"]


def test_a_folder_without_a_tokenizer(model: Path, write_recipe: WriteRecipe) -> None:
    for path in model.glob("token*"):
        path.unlink()
    with pytest.raises(RecipeError, match=r"the tokenizer of .* cannot be loaded") as caught:
        load_tokenizer(load_recipe(write_recipe(model=str(model))))
    assert "hf download ORG/NAME --include '*token*'" in caught.value.fix


def test_a_tokenizer_without_a_template(
    model: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (model / "chat_template.jinja").unlink()
    run = open_run(write_recipe(model=str(model)), tmp_path / "run")
    with pytest.raises(DataError, match="has no chat template") as caught:
        prepare_recipe(run)
    assert "instruct version" in caught.value.fix


def test_a_folder_that_holds_an_adapter(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    recipe = load_recipe(write_recipe(model=str(tmp_path / "adapter")))
    for load in (load_config, load_tokenizer):
        with pytest.raises(RecipeError, match="holds an adapter for org/base") as caught:
            load(recipe)
        assert caught.value.fix.startswith("model: org/base, or a merged model: strixft export")


@pytest.mark.parametrize("level", ["text", "narrower"])
def test_an_adapter_from_another_level(
    level: str, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    """PEFT warns, and goes on with an adapter that does nothing."""
    wrapper = AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=TOWER)
    AutoModelForImageTextToText.from_config(wrapper).save_pretrained(tmp_path / "base")
    narrow = {**TEXT, "intermediate_size": 64}
    other = AutoConfig.for_model("gemma3", text_config=narrow, vision_config=TOWER)
    config = AutoConfig.for_model("gemma3_text", **TEXT) if level == "text" else other
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    base = load_base(load_recipe(write_recipe(model=str(tmp_path / "base"))), "cpu", torch.float32)
    with pytest.raises(StageError, match="trained on another model, or another level") as caught:
        load_adapter(base, tmp_path / "adapter")
    inside = "model.language_model.layers.0."
    first = "model.layers.0." if level == "text" else inside
    assert f"its first layer is {first}mlp.up_proj" in caught.value.problem
    assert f"are named like {inside}self_attn.q_proj" in caught.value.problem


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_package_that_a_class_needs(model: Path, write_recipe: WriteRecipe) -> None:
    """The tower of Gemma 3n comes from timm."""
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": TEXT}))
    with pytest.raises(RecipeError, match="a gemma3n needs a package that is not") as caught:
        architecture_of(load_config(load_recipe(write_recipe(model=str(model)))))
    assert caught.value.fix == "pip install timm"
