"""Streamed weights are those of transformers, bit by bit, from files and from the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
)

from strixft.attention.core import NAME
from strixft.catalog.methods import METHODS
from strixft.model import weights
from strixft.model.files import shard_paths
from strixft.model.load import load_base, quantization_of, shape_base
from strixft.model.packed_experts import packed_in, written_out
from strixft.model.quantised import finish_loaded
from strixft.model.source import load_config
from strixft.model.stream import Shard, checksums_of, streaming
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe
from strixft.support.errors import RecipeError, StageError
from strixft.support.progress import following

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
}


def write_model(folder: Path, model_type: str = "llama", **more: Any) -> Path:
    """A random model in bf16 in several files, with settings of generation of its own."""
    config = AutoConfig.for_model(model_type, **SHAPE | FAMILIES.get(model_type, {}) | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    model.generation_config = GenerationConfig(eos_token_id=[3, 7], temperature=0.4, do_sample=True)
    model.save_pretrained(folder, max_shard_size=50_000)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LEAST_BYTES", 0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the files whose tensors were streamed, in turn."""
    seen: list[Path] = []
    streaming = weights.__dict__["streaming"]

    def watched(paths: list[Path], *rest: Any) -> Any:
        seen.append(paths[0].parent)
        return streaming(paths, *rest)

    monkeypatch.setattr(weights, "streaming", watched)
    return seen


def recipe_of(folder: Path, method: str, write_recipe: WriteRecipe) -> Recipe:
    return load_recipe(write_recipe(model=str(folder), method=method))


def by_transformers(folder: Path, method: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_of(METHODS[method], torch.float32),
        device_map={"": "cpu"},
        attn_implementation=NAME,
    )
    finish_loaded(model)
    return model


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All there is: parameters, buffers, and what belongs to quantised weights, nested too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        for level in filter(None, (state, getattr(state, "state2", None))):
            yield from (
                (f"{name}.{'outer' if level is state else 'nested'}.{key}", value)
                for key, value in vars(level).items()
                if isinstance(value, Tensor)
            )


def plain(value: Any) -> Any:
    """Attributes of a quantised weight or its state that are no tensors."""
    return {
        key: item
        for key, item in vars(value).items()
        if not isinstance(item, Tensor | nn.Module) and not hasattr(item, "__dict__")
    }


def same(ours: Any, theirs: Any) -> int:
    """Hold one model against the other, bit by bit; the number of tensors."""
    left, right = dict(tensors(ours)), dict(tensors(theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        bits = [t.contiguous().view(-1).view(torch.uint8) for t in (tensor, right[name])]
        assert torch.equal(*bits), name
        assert tensor.requires_grad == right[name].requires_grad, name
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert plain(one) == plain(other), name
        if getattr(one, "quant_state", None) is not None:
            assert plain(one.quant_state) == plain(other.quant_state), name
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config == theirs.generation_config
    assert ours.training == theirs.training
    return len(left)


@pytest.mark.parametrize("method", ["full", "qlora", "int8-lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_loads(
    family: str, method: str, tmp_path: Path, write_recipe: WriteRecipe, read: list[Path]
) -> None:
    folder = write_model(tmp_path / family, family)
    assert len(shard_paths(folder)) > 2
    ours: Any = load_base(recipe_of(folder, method, write_recipe), "cpu", torch.float32)
    assert same(ours, by_transformers(folder, method)) >= 12
    assert read == [folder]
    head, embedding = ours.get_output_embeddings(), ours.get_input_embeddings()
    assert (head.weight is embedding.weight) == FAMILIES[family]["tie_word_embeddings"]


def test_every_part_of_the_4_bit_weights_is_compared(llama: Path) -> None:
    names = [name for name, _ in tensors(by_transformers(llama, "qlora")) if "up_proj" in name]
    parts = {name.partition("up_proj.")[2] for name in names}
    assert parts == {
        "weight",
        *(f"weight.outer.{part}" for part in ("absmax", "code", "offset")),
        *(f"weight.nested.{part}" for part in ("absmax", "code")),
    }


AS_QLORA = {"compress_statistics": True, "quant_type": "nf4"}


def put(model: Any, path: str, weight: torch.nn.Parameter) -> None:
    """Put a parameter into the place of packed experts."""
    module, _, name = path.rpartition(".")
    experts, order = model.get_submodule(module), ["gate_up_proj", "down_proj"]
    delattr(experts, name)
    setattr(experts, name, weight)
    if name == order[-1]:
        first = experts.gate_up_proj
        del experts.gate_up_proj, experts.down_proj
        experts.gate_up_proj, experts.down_proj = first, weight


def test_names_that_transformers_converts_are_streamed_too(
    tmp_path: Path, write_recipe: WriteRecipe, read: list[Path], small_is_kept: None
) -> None:
    """Experts stand one by one in the file and as one tensor in the model."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = write_model(tmp_path / "moe", "qwen3_moe", **experts)
    stored = {name for path in shard_paths(folder) for name in load_file(path)}
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in stored
    recipe = recipe_of(folder, "qlora", write_recipe)
    theirs = by_transformers(folder, "qlora")
    for _ in range(2):
        ours = load_base(recipe, "cpu", torch.float32)
        for path, part in packed_in(ours).items():
            whole = theirs.get_parameter(path)
            alone = [dequantize_4bit(*quantize_4bit(m.flatten(), **AS_QLORA)) for m in whole]
            found = written_out(part.tensors, part.shape, torch.float32)
            assert torch.equal(found.flatten(), torch.cat(alone, 1).flatten()), path
            assert 0.05 < float((found - whole.data).norm() / whole.data.norm()) < 0.12
            put(ours, path, whole)
        assert same(ours, theirs) > 12
    assert [path.parent.name for path in read] == [tmp_path.name, "nf4"]


def test_a_type_of_a_device_is_cast_as_transformers_does(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    ours = loading(llama, config, torch.float16).run()
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float16, device_map={"": "cpu"}, attn_implementation=NAME
    )
    assert same(ours, theirs) >= 12


def loading(folder: Path, config: Any, dtype: torch.dtype) -> weights.Loading:
    return weights.Loading(
        source=str(folder), folder=folder, config=config, device="cpu", dtype=dtype,
        quantization=None,
    )  # fmt: skip


def kept_folders(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "nf4").iterdir() if path.is_dir()]


def test_the_second_start_reads_what_the_first_one_kept(
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    read: list[Path],
    small_is_kept: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, theirs = recipe_of(llama, "qlora", write_recipe), by_transformers(llama, "qlora")
    assert same(load_base(recipe, "cpu", torch.float32), theirs)
    assert "4-bit weights cached for the next start: " in capsys.readouterr().err
    assert same(load_base(recipe, "cpu", torch.float32), theirs)
    (kept,) = kept_folders(tmp_path)
    assert read == [llama, kept]
    assert not (kept.parent / ".writing").exists()


def test_another_type_is_kept_beside_it(
    llama: Path, tmp_path: Path, write_recipe: WriteRecipe, read: list[Path], small_is_kept: None
) -> None:
    recipe = recipe_of(llama, "qlora", write_recipe)
    for dtype in (torch.float32, torch.bfloat16):
        load_base(recipe, "cpu", dtype)
    assert read == [llama, llama]
    assert len(kept_folders(tmp_path)) == 2


def change_weight(folder: Path) -> None:
    path = shard_paths(folder)[0]
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})


def change_weight_and_hide_it(folder: Path) -> None:
    before = shard_paths(folder)[0].stat()
    change_weight(folder)
    os.utime(shard_paths(folder)[0], ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(folder: Path) -> None:
    os.utime(shard_paths(folder)[-1], ns=(1, 1))


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize("change", [change_weight, change_weight_and_hide_it, touch, change_config])
def test_another_source_is_quantised_anew_and_replaces_the_old_one(
    change: Any,
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    read: list[Path],
    small_is_kept: None,
) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    recipe = recipe_of(folder, "qlora", write_recipe)
    load_base(recipe, "cpu", torch.float32)
    (before,) = kept_folders(tmp_path)
    change(folder)
    assert same(load_base(recipe, "cpu", torch.float32), by_transformers(folder, "qlora"))
    assert read == [folder, folder]
    (after,) = kept_folders(tmp_path)
    assert after != before


def cut(kept: Path) -> None:
    path = shard_paths(kept)[-1]
    path.write_bytes(path.read_bytes()[:-40])


def flip(kept: Path) -> None:
    path = shard_paths(kept)[-1]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lose(kept: Path) -> None:
    shard_paths(kept)[0].unlink()


def lose_manifest(kept: Path) -> None:
    (kept / "manifest.json").unlink()


def garble_header(kept: Path) -> None:
    path = shard_paths(kept)[0]
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("damage", [cut, flip, lose, lose_manifest, garble_header])
def test_torn_weights_are_made_again(
    damage: Any,
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    small_is_kept: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_of(llama, "qlora", write_recipe)
    theirs = load_base(recipe, "cpu", torch.float32)
    (kept,) = kept_folders(tmp_path)
    damage(kept)
    capsys.readouterr()
    assert same(load_base(recipe, "cpu", torch.float32), theirs)
    told = capsys.readouterr().err
    assert f"the cached 4-bit weights in {kept} are damaged (" in told
    assert "4-bit weights cached for the next start" in told
    assert same(load_base(recipe, "cpu", torch.float32), theirs)
    assert capsys.readouterr().err == ""  # the new ones are whole


def test_what_a_killed_process_was_writing_is_removed(
    llama: Path, tmp_path: Path, write_recipe: WriteRecipe, small_is_kept: None
) -> None:
    left = tmp_path / "cache" / "nf4" / ".writing" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    load_base(recipe_of(llama, "qlora", write_recipe), "cpu", torch.float32)
    assert not left.parent.exists()
    assert len(kept_folders(tmp_path)) == 1


def test_without_room_nothing_is_kept_and_a_line_says_so(
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    small_is_kept: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(weights, "SPARE_BYTES", 10**18)
    load_base(recipe_of(llama, "qlora", write_recipe), "cpu", torch.float32)
    assert "4-bit weights are not cached: " in capsys.readouterr().err
    assert kept_folders(tmp_path) == []


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    small_is_kept: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "nf4").write_text("a file")
    load_base(recipe_of(llama, "qlora", write_recipe), "cpu", torch.float32)
    assert "cannot be written" in capsys.readouterr().err


def test_small_models_are_not_kept(llama: Path, tmp_path: Path, write_recipe: WriteRecipe) -> None:
    load_base(recipe_of(llama, "qlora", write_recipe), "cpu", torch.float32)
    assert not (tmp_path / "cache" / "nf4").exists()


def without(folder: Path, start: str) -> Path:
    """A checkpoint less the weights whose names start so."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name in [one for one in index["weight_map"] if one.startswith(start)]:
        path = folder / index["weight_map"].pop(name)
        save_file({k: v for k, v in load_file(path).items() if k != name}, path, {"format": "pt"})
    file.write_text(json.dumps(index))
    return folder


def with_sides(folder: Path, **sides: Any) -> Path:
    """A checkpoint whose configuration says something else."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sides))
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_that_the_files_lack_are_never_made_up(
    method: str, llama: Path, tmp_path: Path, write_recipe: WriteRecipe, small_is_kept: None
) -> None:
    folder = without(shutil.copytree(llama, tmp_path / "lacking"), "model.layers.0.mlp.up_proj")
    with pytest.raises(RecipeError, match=r"do not hold .*: model.layers.0.mlp.up_proj.weight\n"):
        load_base(recipe_of(folder, method, write_recipe), "cpu", torch.float32)
    assert not (tmp_path / "cache" / "nf4").exists()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_layer_more_than_the_files_hold_is_refused(
    streamed: bool, llama: Path, tmp_path: Path, write_recipe: WriteRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = with_sides(shutil.copytree(llama, tmp_path / "copy"), num_hidden_layers=2)
    if not streamed:
        monkeypatch.setattr(weights, "_hindrance", lambda *_: "it is not to be")
    with pytest.raises(RecipeError, match=r"model\.layers\.1\..* and 8 more") as caught:
        load_base(recipe_of(folder, "lora", write_recipe), "cpu", torch.float32)
    assert str(folder / "config.json") in caught.value.fix


def test_a_vision_tower_is_not_loaded_and_may_lack_its_weights(
    tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    tower = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    tower |= {"hidden_size": 32, "intermediate_size": 48}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={"model_type": "gemma3_text", **SHAPE},
        vision_config={"model_type": "siglip_vision_model", **tower},
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(
        tmp_path / "seeing", max_shard_size=50_000
    )
    whole = load_base(recipe_of(tmp_path / "seeing", "lora", write_recipe), "cpu", torch.float32)
    assert {name.split(".")[1] for name, _ in whole.named_parameters()} == {"language_model"}
    folder = without(tmp_path / "seeing", "vision_tower.")
    assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) < 20
    recipe = recipe_of(folder, "lora", write_recipe)
    load_base(recipe, "cpu", torch.float32)
    without(folder, "language_model.model.layers.0.mlp.up_proj")
    with pytest.raises(RecipeError, match=r"layers\.0\.mlp\.up_proj\.weight\n"):
        load_base(recipe, "cpu", torch.float32)


def test_a_head_that_is_not_in_the_files_is_to_be_tied(
    tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folder = write_model(tmp_path / "qwen2", "qwen2")  # tied: the file has no head
    recipe = recipe_of(with_sides(folder, tie_word_embeddings=False), "lora", write_recipe)
    with pytest.raises(RecipeError, match=r"lm_head\.weight\n") as caught:
        load_base(recipe, "cpu", torch.float32)
    assert '"tie_word_embeddings": true' in caught.value.fix


def test_weights_of_other_sides_are_named_with_both(
    llama: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folder = with_sides(shutil.copytree(llama, tmp_path / "copy"), intermediate_size=128)
    words = r"gate_proj\.weight \(\[96, 64\] in the file, \[128, 64\] in the model\) and 2 more"
    with pytest.raises(RecipeError, match=words):
        load_base(recipe_of(folder, "lora", write_recipe), "cpu", torch.float32)


def ready_made(llama: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint of quantised weights, as transformers writes it."""
    stored = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=stored, device_map={"": "cpu"}
    )
    model.save_pretrained(folder, max_shard_size=30_000)
    return folder


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def test_ready_made_4_bit_weights_are_taken_as_they_are(
    llama: Path, tmp_path: Path, write_recipe: WriteRecipe, read: list[Path], small_is_kept: None
) -> None:
    folder = ready_made(llama, tmp_path / "nf4", **NF4)
    stored = {name for path in shard_paths(folder) for name in Shard(path).entries}
    parts = {name.partition("up_proj.")[2] for name in stored if "up_proj" in name}
    assert {"weight.absmax", "weight.quant_map", "weight.nested_absmax"} < parts
    assert "weight.quant_state.bitsandbytes__nf4" in parts
    ours: Any = load_base(recipe_of(folder, "qlora", write_recipe), "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation=NAME
    )
    layer = ours.model.layers[0].mlp.up_proj
    assert layer.compute_dtype is torch.float32  # of the run, not of whoever wrote the checkpoint
    for parameter in theirs.parameters():
        if parameter.dtype is torch.bfloat16:  # transformers leaves them so
            parameter.data = parameter.data.float()
    theirs.config.quantization_config.bnb_4bit_compute_dtype = torch.float32
    assert same(ours, theirs) > 40
    assert read == [folder]
    assert not (tmp_path / "cache" / "nf4").exists()


@pytest.mark.parametrize(
    "settings",
    [{}, {"bnb_4bit_use_double_quant": False}, {"llm_int8_skip_modules": ["lm_head", "mlp"]}],
    ids=["nested", "plain", "partly"],
)
def test_the_plan_of_ready_made_weights_has_their_shapes(
    settings: Any, llama: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    recipe = recipe_of(ready_made(llama, tmp_path / "nf4", **NF4 | settings), "qlora", write_recipe)
    real = load_base(recipe, "cpu", torch.float32)
    shape = shape_base(load_config(recipe), METHODS["qlora"], torch.float32)
    sizes = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors(model)}
        for model in (real, shape)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("settings", "method", "words", "fix"),
    [
        (NF4, "lora", "stored as nf4, and method lora stores them as native", "method: qlora"),
        ({"load_in_8bit": True}, "qlora", "stored as int8", "method: int8-lora"),
        (
            NF4 | {"bnb_4bit_quant_type": "fp4"},
            "qlora",
            "stored as fp4",
            "model: the version that is not quantised",
        ),
    ],
)
def test_ready_made_weights_need_the_method_that_keeps_them_so(
    settings: Any,
    method: str,
    words: str,
    fix: str,
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
) -> None:
    folder = ready_made(llama, tmp_path / "stored", **settings)
    with pytest.raises(RecipeError, match=words) as caught:
        load_base(recipe_of(folder, method, write_recipe), "cpu", torch.float32)
    assert caught.value.fix == fix


def test_other_names_go_to_transformers_with_a_line(
    llama: Path,
    tmp_path: Path,
    write_recipe: WriteRecipe,
    read: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "named"
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = {name: w for path in shard_paths(folder) for name, w in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(weights, folder / "other.safetensors", {"format": "pt"})
    text = json.dumps(config | {"transformers_weights": "other.safetensors"})
    (folder / "config.json").write_text(text)
    ours: Any = load_base(recipe_of(folder, "full", write_recipe), "cpu", torch.float32)
    assert same(ours, by_transformers(folder, "full"))
    assert read == []
    line = "transformers loads the weights without streaming: its files have unusual names\n"
    assert line in capsys.readouterr().err


def add_adapter(folder: Path, config: Any) -> None:
    (folder / "adapter_config.json").write_text("{}")


def add_code(folder: Path, config: Any) -> None:
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.Mine"}


def add_unknown_type(folder: Path, config: Any) -> None:
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, shard_paths(folder)[0])


def remove_weights(folder: Path, config: Any) -> None:
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_adapter, "holds an adapter"),
        (add_code, "code of its own"),
        (add_unknown_type, "of type C64"),
        (remove_weights, "there is neither model.safetensors nor its index"),
    ],
)
def test_what_is_not_streamed_is_said_and_left_to_transformers(
    change: Any,
    words: str,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights.Loading, "_by_transformers", lambda _: "by transformers")
    folder = shutil.copytree(llama, tmp_path / "copy")
    config = AutoConfig.from_pretrained(folder)
    change(folder, config)
    assert loading(folder, config, torch.float32).run() == "by transformers"
    told = capsys.readouterr().err
    assert told.startswith("transformers loads the weights without streaming: ")
    assert words in told
    assert told.count("\n") == 1


def test_a_file_that_ends_too_early_is_named(
    llama: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folder = shutil.copytree(llama, tmp_path / "cut")
    cut(folder)
    with pytest.raises(StageError, match=r"\.safetensors is truncated or not a") as caught:
        load_base(recipe_of(folder, "full", write_recipe), "cpu", torch.float32)
    assert caught.value.fix == "download the base model again"


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    with Shard(path) as shard:
        os.truncate(path, 5000)
        with pytest.raises(StageError, match=r"model\.safetensors ends too early"):
            shard.read(torch.empty(4000, dtype=torch.uint8), shard.entries["b"].start)


def test_what_was_read_is_not_left_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2**20), "b": torch.ones(2**20)}, path)
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    assert resident_pages(path) > 2000
    checksums_of(path)
    assert resident_pages(path) == 0


def resident_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    import ctypes
    import mmap

    library, size = ctypes.CDLL(None, use_errno=True), path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages)


def test_the_bar_counts_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2**20), "b": torch.ones(2**20)}, path)
    seen: list[dict[str, Any]] = []
    with following(seen.append), streaming([path], "cpu") as found:
        assert all(torch.equal(found[name][...], torch.ones(2**20)) for name in "ab")
    assert re.search(r"weights: 100%.* 8\.00M/8\.00M .*[KMG]iB/s", capsys.readouterr().err)
    assert (seen[-1]["what"], seen[-1]["done"], seen[-1]["total"]) == ("weights", 2**23, 2**23)
