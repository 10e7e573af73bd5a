"""Merged models of many types and layouts, loaded by plain transformers, beside PEFT's own logits.

Nothing of ours makes the reference: transformers builds and saves the base, PEFT the adapter.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import WriteRecipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)

from strixft.export.check import compare, faults
from strixft.export.merge import merge, pass_through
from strixft.model.load import load_base
from strixft.model.quantised import NF4
from strixft.recipe.load import load_recipe
from strixft.recipe.schema import Recipe

SIDES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FULL, SLIDE, LINEAR = "full_attention", "sliding_attention", "linear_attention"
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
"""Experts narrower than the model: their two sides cannot be told apart by size."""
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": [LINEAR, FULL], "head_dim": 16,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": [SLIDE, FULL]},
    "phi3": {"sliding_window": None},
    "glm4": {"head_dim": 16},
    "olmo3": {"layer_types": [SLIDE, FULL]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": {"layer_types": [SLIDE, FULL]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "lfm2": {"layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False},
    "qwen3_moe": {"head_dim": 16, **ROUTED},
    "mixtral": LOCAL,
    "minimax_m2": {"head_dim": 16, **LOCAL},
    "glm4_moe": {"head_dim": 16, **GROUPED},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "granitemoe": LOCAL,
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1, **ROUTED},
    "qwen3_next": {"shared_expert_intermediate_size": 32, **DELTA, **ROUTED},
    "qwen3_5_text": DELTA,
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": [SLIDE, FULL],
        "num_experts": 4,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0,
    },
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        **GROUPED,
    },
    "nemotron_h": {
        "head_dim": 16,
        "layers_block_type": [LINEAR, "moe", FULL, "mlp"],
        "num_hidden_layers": 4,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        **GROUPED,
    },
    "jamba": {
        **ROUTED,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}
TARGETS = {
    "nemotron_h": [*ATTENTION, "in_proj", "up_proj", "down_proj"],
    "jamba": [*ATTENTION, "in_proj", "x_proj", "gate_proj", "up_proj", "down_proj"],
}
"""PEFT refuses `out_proj` of Mamba layers; `dt_proj` is read beside its adapter."""
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **SIDES, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": [SLIDE, FULL],
        },
        "vision_config": {"model_type": "siglip_vision_model", **SIGHT},
        "mm_tokens_per_image": 4, "image_token_index": 10,
    },
    "qwen3_5": {
        "text_config": {**SIDES, **DELTA},
        "vision_config": {
            "model_type": "qwen3_5_vision", "depth": 1, "hidden_size": 32, "num_heads": 2,
            "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 8,
            "num_position_embeddings": 16,
        },
    },
}  # fmt: skip
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def write_base(folder: Path, kind: str = "llama", **more: Any) -> Path:
    """A random model as transformers saves it, with weights large enough for a swap to show."""
    own = WRAPPERS.get(kind) or {**SIDES, **TYPES[kind]}
    auto = AutoModelForImageTextToText if kind in WRAPPERS else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **own, **more), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08)
    model.save_pretrained(folder)
    return folder


def adapt(base: Path, adapter: Path, targets: Any = "all-linear", **more: Any) -> torch.Tensor:
    """Save an adapter that changes much; returns PEFT's logits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    if any("vision_tower" in name for name, _ in model.named_modules()):  # training leaves it out
        more["exclude_modules"] = ".*(vision_tower|projector).*"
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False,
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(adapter)
    return logits(adapted.eval())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float().flatten(0, 1)
    return found


def plain(folder: Path) -> torch.Tensor:
    """Logits of a folder as anybody loads it."""
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def assert_same(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    """Equal within rounding, and far from the base."""
    figures = compare([wanted], [found], [base])
    assert not faults(figures, exact=True), figures
    assert figures["learned_kl"] > 1e-4


@pytest.fixture
def merged(write_recipe: WriteRecipe, tmp_path: Path) -> Callable[..., Path]:
    """Merges the adapter in `adapter` into a base."""

    def run(base: Path, method: str = "lora") -> Path:
        recipe: Recipe = load_recipe(write_recipe("it", model=str(base), method=method))
        target = tmp_path / "merged"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        merge(recipe, base, tmp_path / "adapter", target)
        return target

    return run


@pytest.mark.parametrize("kind", [*TYPES, *WRAPPERS])
def test_every_type(kind: str, merged: Callable[..., Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    wanted = adapt(base, tmp_path / "adapter", TARGETS.get(kind, "all-linear"))
    assert_same(plain(merged(base)), wanted, plain(base))
    names = [set(load_file(path / "model.safetensors")) for path in (base, tmp_path / "merged")]
    assert names[0] == names[1]


def bare(folder: Path) -> None:
    """Names as `AutoModel` saves them."""
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(short, folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path) -> None:
    """Many files with an index; tensors of one layer lie in several of them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def with_strays(folder: Path) -> None:
    """What publishers put beside the weights: another format's, another type's, an adapter's."""
    weights = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        save_file(zeros, folder / name)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"no weights")
    (folder / "pytorch_model.bin").write_bytes(b"no weights")


def old_wrapper(folder: Path) -> None:
    """Names as wrappers were saved by transformers 4."""
    weights = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in weights)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files, by name."""
    return {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}


def half_tied(folder: Path) -> None:
    """A tied head that is stored a second time."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_mtp(folder: Path) -> None:
    """A head for several tokens ahead, which transformers neither builds nor saves."""
    weights = load_file(folder / "model.safetensors")
    weights["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(8, 4, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_what_transformers_does_not_build_is_in_the_merged_model(
    merged: Callable[..., Path], tmp_path: Path
) -> None:
    """Other merges drop the tower or the head without a word (modelscope/ms-swift#9187)."""
    targets = ["in_proj_qkv", "out_proj", "down_proj"]
    base = write_base(tmp_path / "base", "qwen3_5")
    with_mtp(base)
    adapt(base, tmp_path / "adapter", targets)
    before, after = (load_file(path / "model.safetensors") for path in (base, merged(base)))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        changed = not torch.equal(weight, after[name])
        adapted = "visual" not in name and "mtp" not in name
        assert changed is (adapted and any(f".{one}." in name for one in targets)), name
        assert after[name].dtype is weight.dtype


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", bare), ("qwen3", bare), ("qwen3_moe", bare), ("llama", sharded),
        ("qwen3_moe", sharded), ("mistral", with_strays), ("qwen2", half_tied),
        ("gemma3", old_wrapper),
    ],
)  # fmt: skip
def test_every_layout(
    kind: str, layout: Callable[[Path], None], merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", kind)
    layout(base)
    wanted = adapt(base, tmp_path / "adapter")
    target = merged(base)
    assert_same(plain(target), wanted, plain(base))
    index = "model.safetensors.index.json"
    own = sorted(path.name for path in base.glob("model*.safetensors") if "fp16" not in path.name)
    assert sorted(path.name for path in target.rglob("*.safetensors")) == own
    assert (target / index).is_file() == (base / index).is_file()
    assert not list(target.rglob("*.pth")) + list(target.rglob("*.bin"))


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True}, {"bias": "none"}])
def test_every_kind_of_adapter(
    more: dict[str, Any], merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    wanted = adapt(base, tmp_path / "adapter", ATTENTION, **more)
    assert_same(plain(merged(base)), wanted, plain(base))


PACKED: dict[str, dict[str, Any]] = {"qlora": NF4, "int8-lora": {"load_in_8bit": True}}


@pytest.mark.parametrize("method", PACKED)
def test_a_base_that_is_packed_in_its_files(
    method: str, merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "whole")
    quantised = BitsAndBytesConfig(**PACKED[method])
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised)
    packed.save_pretrained(tmp_path / "packed")
    adapt(base, tmp_path / "adapter", ATTENTION)
    target = merged(tmp_path / "packed", method)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    kinds = {weight.dtype for weight in load_file(target / "model.safetensors").values()}
    assert kinds <= {torch.bfloat16, torch.float32}
    whole = packed.train().dequantize(
        dtype=torch.float32
    )  # in evaluation some processors repack the weights
    wanted = logits(PeftModel.from_pretrained(whole.float(), tmp_path / "adapter").eval())
    figures = compare([wanted], [plain(target)], [logits(whole.float())])
    assert not faults(figures, exact=False), figures


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_what_no_text_goes_through_stays_as_it_is(
    kind: str, merged: Callable[..., Path], tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    """The tower of a wrapper, and a head that transformers does not load."""
    base = write_base(tmp_path / "base", kind)
    file = base / "model.safetensors"
    before = load_file(file) | {"mtp.fc.weight": torch.randn(4, 4)}
    save_file(before, file, {"format": "pt"})
    outside = {name for name in before if re.search("vision|visual|projector|mtp", name)}
    assert len(outside) > 5
    adapt(base, tmp_path / "adapter", ATTENTION)
    recipe = load_recipe(write_recipe(model=str(base)))
    trained, model = tmp_path / "trained", load_base(recipe, "cpu", torch.float32)
    model.save_pretrained(trained)  # type: ignore[operator]
    pass_through(recipe, base, trained)
    for folder in (merged(base, "qlora"), trained):
        after = tensors_in(folder)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in outside)


def test_experts_of_a_4_bit_run_are_what_was_trained_on(
    merged: Callable[..., Path], tmp_path: Path
) -> None:
    """An expert stands in three tensors of the file, and in two parameters that are packed."""
    base = write_base(tmp_path / "base", "lfm2_moe")
    adapt(base, tmp_path / "adapter", ["q_proj"])
    before, after = (
        load_file(path / "model.safetensors") for path in (base, merged(base, "qlora"))
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    prefix = "model.layers.1.feed_forward.experts.1"
    for parts in (("w1", "w3"), ("w2",)):
        names = [f"{prefix}.{part}.weight" for part in parts]
        whole = torch.cat([before[name] for name in names]).float().flatten()
        stored = quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
        found = torch.cat([after[name] for name in names]).flatten()
        assert torch.equal(dequantize_4bit(*stored).flatten().to(found.dtype), found)
    assert "model.layers.0.feed_forward.w1.weight" not in same


def test_what_stands_beside_the_weights_is_taken_along(
    merged: Callable[..., Path], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    beside = [
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt",
        "vocab.json", "tokenizer.model", "qwen.tiktoken", "preprocessor_config.json",
        "processor_config.json", "modeling_own.py", "own/layers.py", "generation_config.json",
    ]  # fmt: skip
    for name in beside:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f'"{name}"')
    for name in ("README.md", "model.gguf", ".git/config.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("not ours")
    target = merged(base)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {*beside, "config.json", "model.safetensors"}
    assert (target / "own/layers.py").read_text() == '"own/layers.py"'


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits = found.logits * 2
        return found
"""


def test_a_model_with_code_of_its_own(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    (base / "own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": names})
    )
    trusting = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", trusting)
    wanted = adapt(base, tmp_path / "adapter")
    recipe = load_recipe(write_recipe("it", model=str(base), trust_remote_code=True))
    target = tmp_path / "merged"
    target.mkdir()
    merge(recipe, base, tmp_path / "adapter", target)
    base.rename(tmp_path / "gone")
    merged = plain(target)
    assert_same(merged, wanted, plain(tmp_path / "gone"))


def damaged(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def _double(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.mul_(2 if "lora_B" in name else 1)


def _one_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.mul_(0 if ".layers.1." in name else 1)


@pytest.mark.parametrize("change", [_zero, _double, _one_layer])
@pytest.mark.parametrize("exact", [True, False])
def test_a_merge_of_another_adapter_is_seen(
    change: Callable[[dict[str, torch.Tensor]], None],
    exact: bool,
    merged: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = write_base(tmp_path / "base")
    wanted = adapt(base, tmp_path / "adapter")
    damaged(tmp_path / "adapter", change)
    figures = compare([wanted], [plain(merged(base))], [plain(base)])
    assert faults(figures, exact=exact), figures
