"""An architecture's own layers are tried: documents that share rows, and kernels of packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, WriteRecipe
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from strixft.attention import masks
from strixft.attention.backends import BACKENDS
from strixft.guard.host import find_host
from strixft.model.architecture import architecture_of, sample_layers
from strixft.model.kernels import guard_kernels, switch_off
from strixft.model.source import load_config, model_source
from strixft.plan.result import plan_figures
from strixft.probe import layers
from strixft.probe import run as probe_run
from strixft.probe.checks import prove_layers
from strixft.probe.job import Job
from strixft.probe.layers import measure_layers, plain_config
from strixft.recipe.load import load_recipe
from strixft.support.errors import HostError, RecipeError

SIDES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LFM2 = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv", "full_attention"]}
DELTA = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": LFM2,
    "lfm2_moe": {**LFM2, **EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "qwen3_next": {**DELTA, **EXPERTS},
    "olmo_hybrid": DELTA,
    "falcon_h1": MAMBA,
}
STATE = ("falcon_h1",)


def a_config(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **{**SIDES, **OWN[model_type]})


def measured(model_type: str, backend: str, dtype: str = "float32") -> dict[str, Any]:
    config = a_config(model_type)
    chosen = sample_layers(architecture_of(config).kinds)
    row = asdict(BACKENDS[backend])
    return measure_layers(plain_config(config), chosen, row, "cpu", dtype)


@pytest.mark.parametrize("model_type", OWN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_that_share_rows_are_as_each_alone_but_where_layers_carry_states(
    model_type: str, dtype: str
) -> None:
    """axolotl-ai-cloud/axolotl#3572, huggingface/transformers#46588: without kernels they leak."""
    figures = measured(model_type, "sdpa-packed", dtype)
    assert ("problem" in figures) == (model_type in STATE), figures
    if model_type in STATE:
        assert "from those of each document alone" in figures["problem"]
        assert figures["error"] > (3 if dtype == "float32" else 1) * figures["allowed_error"]
    else:
        assert figures["error"] < 0.6 * figures["allowed_error"]
    alone = measured(model_type, "eager-rows", dtype)
    assert "problem" not in alone
    assert "untried" not in alone


@pytest.mark.parametrize(
    "mutant",
    [
        lambda right, documents, window: right(documents * 0, window),
        lambda right, documents, window: right(documents, None),
        lambda right, documents, window: right(documents, window and window - 1),
    ],
)
def test_a_wrong_mask_is_found(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = masks.dense_mask

    def wrong(documents: Tensor, window: int | None = None) -> Tensor:
        found: Tensor = mutant(right, documents, window)
        return found

    monkeypatch.setattr(masks, "dense_mask", wrong)
    assert "off by" in measured("gemma3_text", "sdpa-packed")["problem"]


def test_the_generator_of_training_is_left_alone() -> None:
    torch.manual_seed(5)
    due = torch.rand(3)
    torch.manual_seed(5)
    measured("llama", "sdpa-packed")
    assert torch.equal(torch.rand(3), due)


def test_what_is_too_large_or_fails_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.LARGEST, "cpu", 1000)
    assert "too many to try" in measured("llama", "sdpa-packed")["untried"]
    row = asdict(BACKENDS["sdpa-packed"])
    assert measure_layers({"model_type": "nobody"}, [0], row, "cpu", "float32")["untried"]


def test_a_trial_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe_run, "_memo", {})
    packed, host, config = [BACKENDS["sdpa-packed"]], find_host("cpu"), a_config("falcon_h1")
    found = prove_layers(config, host, packed)
    monkeypatch.setattr(probe_run, "_memo", {})
    monkeypatch.setitem(probe_run.KINDS, "layers", None)
    assert prove_layers(config, host, packed) == found
    assert list(found.leaks) == ["sdpa-packed"]


def write_model(folder: Path, model_type: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model_source("embedded:smollm2-135m"))
    config = a_config(model_type)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("host", ["cpu", "strix-halo-128"])
def test_a_plan_says_why_rows_are_not_packed(
    host: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(model=str(write_model(tmp_path / "falcon", "falcon_h1"))))
    figures = plan_figures(recipe, host)
    assert figures["choice"]["packed"] is None
    assert figures["packing"] == {
        "packed": False,
        "reason": "its layers would carry on from one document of a row to the next",
    }
    (warning,) = (line for line in figures["warnings"] if "not packed" in line)
    assert warning.startswith("rows are not packed, though dataset.packing is true: its layers")


def test_a_packed_plan_says_so(write_recipe: WriteRecipe) -> None:
    figures = plan_figures(load_recipe(write_recipe()), "cpu")
    assert figures["packing"] == {"packed": True, "reason": None}


def test_packing_that_leaks_here_is_off_with_its_reason(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "hidden states are off by 1"
    monkeypatch.setattr("strixft.probe.checks.measure_here", lambda task: {"problem": problem})
    recipe, host = load_recipe(write_recipe()), find_host("cpu")
    job = Job.of(recipe, load_config(recipe), host)
    assert not job.options.backend.packed
    assert job.unpacked_because == f"tried on {host.name}: {problem}"
    with pytest.raises(RecipeError, match=f"attention 'eager' cannot train llama .*{problem}"):
        Job.of(load_recipe(write_recipe(train={"attention": "eager"})), job.config, host)
    choice = {"attention": "sdpa-packed"}
    with pytest.raises(HostError, match=f"'sdpa-packed', which the plan chose, .*{problem}"):
        Job.planned(recipe, job.config, host, choice, "strixft run x --from plan")


def test_kernels_with_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/peft#1612: a fused kernel is given weights; their adapters do not learn."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

    package, code = ModuleType("a_package"), ModuleType("a_model")
    names = ("causal_conv1d_update", "mamba_split_conv1d_scan_combined")
    for name in names:
        setattr(package, name, lambda x, *, seq_idx=None: f"kernel {seq_idx}")
    monkeypatch.setitem(sys.modules, "a_package", package)
    monkeypatch.setitem(sys.modules, "a_model", code)
    for name in names:

        def plain(x: Tensor, **options: Any) -> str:
            return "plain"

        beside = use_kernel_func_from_hub_with_fallback(name, "a_package")
        setattr(code, name, beside(plain))
    model = type("Mixer", (nn.Module,), {"__module__": "a_model"})()
    for _ in range(2):  # the second time they have their switches
        assert guard_kernels(model) == ("a_package",)
    convolve: Any = code.causal_conv1d_update
    here, meta = torch.ones(1), torch.ones(1, device="meta")
    assert convolve(here, seq_idx=3) == "kernel 3"
    assert convolve(meta, seq_idx=3) == "plain"
    assert code.mamba_split_conv1d_scan_combined(here) == "plain"
    switch_off(["a_package"])
    assert convolve(here) == "plain"
    switch_off([])
    assert convolve(here) == "kernel None"


@pytest.mark.parametrize("name", ["hidden", "tokens", "a", "b"])
def test_a_value_that_is_not_a_number_is_wrong(name: str) -> None:
    """fla-org/flash-linear-attention#913: a backward kernel ends well and gives NaN."""
    due = {key: torch.ones(4, 3) for key in ("hidden", "tokens", "a", "b")}
    found = {key: value.clone() for key, value in due.items()}
    found[name][2, 1] = torch.nan
    figures = layers._judged(layers._errors(found, due), dict.fromkeys(layers._SAID, 1e-7))
    assert "are off by" in figures["problem"]
    assert figures["error"] is None


FLA = '''
"""A kernel with the name of flash-linear-attention's; `{wrong}` is added to its result."""
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as own


def chunk_gated_delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel=False):
    plain, norm = own.torch_chunk_gated_delta_rule.__wrapped__, use_qk_l2norm_in_kernel
    result, state = plain(query, key, value, g, beta, use_qk_l2norm_in_kernel=norm)
    return result + {wrong} * torch.roll(result, 1, 1), state


def fused_recurrent_gated_delta_rule(*args, **options):
    raise RuntimeError("invalid device function")
'''
CONV = """
def causal_conv1d_fn(x, weight, bias=None, activation=None, seq_idx=None):
    import torch
    weight, width = weight.unsqueeze(1), weight.shape[-1] - 1
    out = torch.nn.functional.conv1d(x, weight, bias, padding=width, groups=len(weight))
    return torch.nn.functional.silu(out[..., : x.shape[-1]])
"""
SCRIPT = """
import json, sys
from strixft.plan.result import plan_figures
from strixft.recipe.load import load_recipe
recipe = load_recipe(sys.argv[1])
from strixft.model.kernels import guard_kernels, switch_off
from strixft.model.source import load_config
from strixft.model.architecture import architecture_of
figures = plan_figures(recipe, "cpu")
kernels = architecture_of(load_config(recipe)).kernels
print("FIGURES" + json.dumps([sorted(kernels), figures["kernels_off"], figures["packing"]]))
"""


@pytest.mark.parametrize("wrong", [0.0, 0.05])
def test_a_kernel_that_is_there_and_wrong_is_switched_off(
    wrong: float, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "modules"
    for name, text in (("fla", FLA.format(wrong=wrong)), ("causal_conv1d", CONV)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    model = write_model(tmp_path / "qwen", "qwen3_5_text")
    path = write_recipe(model=str(model))
    found = os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env={**os.environ, "PYTHONPATH": found, "STRIXFT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FIGURES" in done.stdout, done.stderr[-2000:]
    kernels, off, packing = json.loads(done.stdout.partition("FIGURES")[2])
    assert kernels == ["causal_conv1d", "fla"]
    assert list(off) == (["fla"] if wrong else [])
    assert all("off by" in problem for problem in off.values())
    assert packing["packed"]
