"""A damaged `config.json` is refused with its place and what to do, never with a traceback."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe

from strixft.model.config import MOST, check_raw, warnings_of
from strixft.model.source import load_config
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ABSURD = [-1, 0, "many", 1.5, [3], True, 10**12]
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4}
MIXTRAL = GOOD | {"model_type": "mixtral", "num_local_experts": 4}
GEMMA = GOOD | {"model_type": "gemma3_text"}


@pytest.fixture
def recipe_of(tmp_path: Path, write_recipe: WriteRecipe) -> Any:
    """A recipe on a folder with this configuration."""

    def make(config: Any) -> Recipe:
        folder = tmp_path / "model"
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        train = {"micro_batch": 1, "recompute": 0}
        return load_recipe(write_recipe(model=str(folder), train=train))

    return make


@pytest.mark.parametrize("name", [n for n in MOST if n in GOOD])
@pytest.mark.parametrize("value", ABSURD)
def test_an_absurd_number_is_named(name: str, value: Any, recipe_of: Any) -> None:
    if (name, value) == ("max_position_embeddings", 10**12):
        value = -(10**12)
    fault = rf"model/config\.json describes no model: .*{name} should be a whole number from 1 to"
    with pytest.raises(RecipeError, match=fault) as caught:
        load_config(recipe_of(GOOD | {name: value}))
    assert "correct" in caught.value.fix


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (without("model_type"), "model_type is missing"),
        (without("hidden_size"), "hidden_size is missing"),
        (without("num_hidden_layers"), "num_hidden_layers is missing"),
        ({}, "model_type is missing"),
        ([GOOD], "has no settings"),
        ("{", "not a valid JSON file"),
        ("", "not a valid JSON file"),
        ("\x00\x01", "not a valid JSON file"),
        (GOOD | {"model_type": "lama"}, r"transformers [\d.]+ does not know the model type 'lama'"),
        (GOOD | {"model_type": 7}, "model_type is missing"),
        (
            GOOD | {"model_type": "own", "auto_map": {"AutoConfig": "x.C"}},
            "runs Python code of its own",
        ),
        ({"model_type": "t5"}, "a t5 does not continue text"),
        (GOOD | {"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads, 3"),
        (GOOD | {"head_dim": 7}, "the size of a head, 7, is not even"),
        (GOOD | {"hidden_size": 65}, "the size of a head, 16.25, is not even"),
        (GEMMA | {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (GEMMA | {"layer_types": ["x", "y"]}, "describes no model: .*layer_types"),
        (GEMMA | {"sliding_window": -5}, "sliding_window should be"),
        (GOOD | {"quantization_config": {"quant_method": "gptq"}}, "stored as gptq"),
        (GOOD | {"dtype": "float99"}, "describes no model: .*float99"),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(config: Any, problem: str, recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        load_config(recipe_of(config))
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "awq"])  # MXFP4 is known of gpt-oss alone
def test_weights_that_are_stored_otherwise_lead_to_the_16_bit_ones(
    kind: str, recipe_of: Any
) -> None:
    """As Ministral 3 and MiniMax M2 come (huggingface/transformers#46736)."""
    with pytest.raises(RecipeError, match=f"the weights are stored as {kind}") as caught:
        load_config(recipe_of(GOOD | {"quantization_config": {"quant_method": kind}}))
    assert "ends in -BF16" in caught.value.fix


def test_what_only_building_shows_is_refused_too(recipe_of: Any) -> None:
    change = {"rope_parameters": {"rope_type": "nope"}}
    with pytest.raises(RecipeError, match=r"no llama can be built from its config\.json"):
        plan_figures(recipe_of(GOOD | change), "strix-halo-128")


def test_all_faults_are_named_at_once(recipe_of: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load_config(recipe_of(GOOD | {"vocab_size": 0, "hidden_size": -4}))
    assert "vocab_size" in caught.value.problem
    assert "hidden_size" in caught.value.problem


def test_a_near_model_type_is_named(recipe_of: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load_config(recipe_of(GOOD | {"model_type": "lama"}))
    assert "did you mean 'llama'?" in caught.value.fix


def test_rows_beyond_the_positions_are_warned_about(recipe_of: Any) -> None:
    config = load_config(recipe_of(GOOD))
    assert warnings_of(config, 512) == []
    (warning,) = warnings_of(config, 513)
    assert "513 tokens are longer than the 512 positions" in warning
    assert "--set dataset.max_length=512" in warning


def test_rows_that_change_the_positions_of_others_are_warned_about(recipe_of: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = {"type": "longrope", **factors}
    sides = {"model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 16}
    config = load_config(recipe_of(GOOD | sides | {"rope_scaling": longrope}))
    assert warnings_of(config, 16) == []
    (warning,) = warnings_of(config, 17)
    assert "more than 16 tokens uses the long factors" in warning
    assert "--set dataset.max_length=16" in warning
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        short = torch.arange(1, 11)[None]
        alone, long = model(short).logits, torch.arange(1, 18)[None]
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[1, 10:] = 0
        rows = torch.cat([long, torch.nn.functional.pad(short, (0, 7))])
        together = model(rows, attention_mask=mask).logits[1, :10]
    assert not torch.allclose(alone[0], together, atol=1e-3)


def test_the_plan_shows_the_warning(recipe_of: Any) -> None:
    figures = plan_figures(recipe_of(GOOD | {"max_position_embeddings": 100}), "strix-halo-128")
    assert "longer than the 100 positions" in figures["warnings"][0]


def test_an_unknown_host_names_the_near_one(recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match="there is no host 'strix-halo-12'") as caught:
        plan_figures(recipe_of(GOOD), "strix-halo-12")
    assert "did you mean 'strix-halo-128'?" in caught.value.fix


WORDS = [
    ({"hidden_act": "nosuch"}, "hidden_act: transformers does not know 'nosuch'; "),
    ({"hidden_act": "sylu"}, "hidden_act: transformers does not know 'sylu'; did you mean 'silu'?"),
    ({"dtype": "bfloat61"}, "dtype: torch has no 'bfloat61'"),
    ({"torch_dtype": "nn"}, "torch_dtype: torch has no 'nn'"),
    ({"attention_dropout": 2}, "attention_dropout should be at least 0 and less than 1, it is 2"),
    (
        {"attention_dropout": "half"},
        "attention_dropout should be at least 0 and less than 1, it is 'half'",
    ),
    ({"rope_theta": 0}, "rope_theta should be a number above 0, it is 0"),
    ({"rope_theta": -1.5}, "rope_theta should be a number above 0, it is -1.5"),
    ({"rope_theta": "1e4"}, "rope_theta should be a number above 0, it is '1e4'"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta should be a number above 0, it is 0"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is of type yarn, and its factor is None"),
    ({"rope_scaling": [1]}, "rope_scaling should hold settings, it is [1]"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 0}},
        "rope_scaling is of type yarn, and its factor",
    ),
    ({"rope_parameters": [1]}, "rope_parameters should hold settings, it is [1]"),
    (
        {"activation_function": "gelo"},
        "activation_function: transformers does not know 'gelo'; did",
    ),
    ({"text_config": []}, "text_config should hold settings, it is []"),
    ({"text_config": 0}, "text_config should hold settings, it is 0"),
    ({"text_config": [1]}, "text_config should hold settings, it is [1]"),
]


@pytest.mark.parametrize(("change", "fault"), WORDS)
def test_a_setting_that_means_nothing_is_named(change: Any, fault: str, recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match="describes no model") as caught:
        load_config(recipe_of(GOOD | change))
    assert fault in caught.value.problem


@pytest.mark.parametrize("name", ["vocab_size", "num_attention_heads", "intermediate_size"])
def test_a_side_that_is_missing_is_not_made_up(name: str, recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match=f"describes no model: {name} is missing"):
        load_config(recipe_of(without(name)))


def test_a_type_that_calls_its_sides_otherwise_is_read(recipe_of: Any) -> None:
    assert load_config(recipe_of(GPT2)).hidden_size == 64


OLD = [
    {"model_type": "bloom", "vocab_size": 9, "n_embed": 64, "n_layer": 2, "n_head": 4},
    {"model_type": "lfm2", "block_ff_dim": 160}
    | {key: value for key, value in GOOD.items() if key not in ("model_type", "intermediate_size")},
]


@pytest.mark.parametrize("config", OLD, ids=["bloom", "lfm2"])
def test_an_old_name_of_a_side_is_read(config: Any) -> None:
    check_raw(config, "config.json")


@pytest.mark.parametrize(
    ("config", "name"),
    [(GPT2, name) for name in ("n_embd", "n_layer", "n_head", "vocab_size")]
    + [(MIXTRAL, name) for name in ("vocab_size", "num_attention_heads", "intermediate_size")],
)
def test_a_missing_side_is_called_as_its_type_calls_it(
    config: dict[str, Any], name: str, recipe_of: Any
) -> None:
    rest = {key: value for key, value in config.items() if key != name}
    with pytest.raises(RecipeError, match=f"describes no model: {name} is missing") as caught:
        load_config(recipe_of(rest))
    assert caught.value.fix.endswith("model/config.json, or download the model again")


def test_a_window_that_is_off_may_be_zero() -> None:
    window = {"use_sliding_window": False, "sliding_window": 0}
    check_raw(GOOD | {"model_type": "qwen2_moe"} | window, "config.json")


def test_what_a_kind_of_rotary_positions_lacks_is_named(recipe_of: Any) -> None:
    scaling = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(RecipeError, match=r"config\.json describes no model: .*low_freq") as caught:
        load_config(recipe_of(GOOD | scaling))
    assert caught.value.fix.startswith("correct ")
    assert caught.value.fix.endswith("model/config.json")


def test_what_the_hub_leaves_out_of_a_text_config_is_read(recipe_of: Any) -> None:
    """As in google/gemma-3-4b-it, whose vocabulary and heads are defaults."""
    sides = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text = {"model_type": "gemma3_text", **sides}
    config = load_config(recipe_of({"model_type": "gemma3", "text_config": text}))
    assert config.get_text_config().hidden_size == 2560


def test_a_file_that_is_nested_too_deeply_is_refused(recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match=r"config\.json is nested too deeply"):
        load_config(recipe_of('{"a":' * 100_000 + "1" + "}" * 100_000))


def test_a_folder_without_a_configuration_is_told(
    tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"empty/config\.json is missing") as caught:
        load_config(load_recipe(write_recipe(model=str(folder))))
    assert caught.value.fix.endswith(f"hf download ORG/NAME --local-dir {folder}")


def test_a_model_lies_beside_its_recipe(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_of(GOOD)
    path = tmp_path / "beside.yaml"
    path.write_text("model: ./model\ndataset: {source: rows.jsonl}\n")
    assert load_recipe(path).model == str(tmp_path / "model")
    (tmp_path / "else" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else")
    assert load_recipe(path).model == str(tmp_path / "model")
    assert load_recipe(path, {"model": "model"}).model == str(tmp_path / "else" / "model")
    assert load_recipe(path, {"model": "org/name"}).model == "org/name"


@pytest.mark.parametrize("name", ["./modle", "../modle", "~nobody-here/modle"])
def test_a_folder_that_is_not_there_is_told_where_it_would_be(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "model", tmp_path / "recipes" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(GOOD))
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_text(f"model: {name}\ndataset: {{source: rows.jsonl}}\n")
    recipe = load_recipe(path)
    assert recipe.model == os.path.realpath(path.parent / name)
    with pytest.raises(RecipeError) as caught:
        load_config(recipe)
    assert caught.value.problem == f"model: {recipe.model} is not a folder"
    near = "a folder that holds config.json" if name[0] == "~" else "did you mean 'model'?"
    assert caught.value.fix == (
        f"{near}   (relative to the recipe's file, or with --set to the current folder)"
    )


def test_a_folder_where_the_command_is_typed_is_found_too(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_of(GOOD)
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_text("model: ./model\ndataset: {source: rows.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).model == str(tmp_path / "model")
    missing = load_recipe(path, {"model": "./else"}).model
    assert missing == str(tmp_path / "else")


def plan_with(recipe: Recipe, *targets: str) -> dict[str, Any]:
    lora = recipe.lora.model_copy(update={"target_modules": list(targets)})
    return plan_figures(recipe.model_copy(update={"lora": lora}), "cpu")


LINEAR = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
UNKNOWN = [
    (["q_proj", "v_porj"], "'v_porj'", "did you mean 'v_proj'?"),
    (["nope", "xyz"], "'nope', 'xyz'", f"choose one of: {LINEAR}"),
    (["q_proj", "mlp"], "'mlp'", f"choose one of: {LINEAR}"),
    (["q_proj", "embed_tokens"], "'embed_tokens'", f"choose one of: {LINEAR}"),
    (["input_layernorm"], "'input_layernorm'", f"choose one of: {LINEAR}"),
    ([""], "''", f"choose one of: {LINEAR}"),
]


@pytest.mark.parametrize(("targets", "unknown", "fix"), UNKNOWN)
def test_a_linear_layer_that_the_model_does_not_have_is_named(
    targets: list[str], unknown: str, fix: str, recipe_of: Any
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_with(recipe_of(GOOD), *targets)
    assert caught.value.problem == (
        f"lora.target_modules: the model has no linear layer {unknown}; its layers are {LINEAR}"
    )
    assert caught.value.fix == fix


def test_a_layer_may_be_named_by_the_end_of_its_path(recipe_of: Any) -> None:
    assert plan_with(recipe_of(GOOD), "self_attn.q_proj", "layers.0.mlp.up_proj")["fits"]
