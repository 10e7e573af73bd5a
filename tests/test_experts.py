"""Experts that a router chooses, beside transformers' own loop over experts and PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from sweep.inputs import write_folder, write_recipe
from sweep.models import SWEPT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import strixft
from strixft.catalog.methods import METHODS
from strixft.evaluate.experts import compare_experts, says
from strixft.evaluate.losses import row_losses
from strixft.model import experts, kernels, packed_experts
from strixft.model.adapter import attach_adapter
from strixft.model.expert_counts import counting
from strixft.model.experts import (
    call_routed,
    fused_experts,
    grouped_gradient,
    grouped_product,
    routed_experts,
)
from strixft.model.packed_experts import (
    PackedExperts,
    can_pack,
    pack_shape,
    packed,
    packed_in,
    packed_product,
    written_out,
)
from strixft.plan.cost import operator_cost
from strixft.probe import experts as trial
from strixft.recipe.schema import Lora
from strixft.run.open import open_run
from strixft.support.errors import RecipeError
from strixft.train.coverage import describe

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
}
QWEN = TINY | {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 16}
GPT_OSS = TINY | {"model_type": "gpt_oss", "num_local_experts": 6}
"""Matrices the other way round, with biases, gate and up interleaved."""

Grads = dict[str, torch.Tensor]


def random_model(sides: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**sides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def plain_peft(model: Any, rank: int = 4) -> Any:
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(model, config)


def with_factors(model: Any, attach: Callable[[Any], Any]) -> Any:
    adapted = attach(model)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


def step(model: Any) -> tuple[torch.Tensor, Grads]:
    ids = torch.arange(34).view(2, 17) % 23
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    grads = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    return found.logits.detach(), grads


@pytest.mark.parametrize("sides", [QWEN, GPT_OSS], ids=lambda sides: sides["model_type"])
@pytest.mark.parametrize("rank", [3, 8])
def test_adapters_of_experts_are_those_of_peft(sides: dict[str, Any], rank: int) -> None:
    base, lora = random_model(sides), Lora(r=rank, alpha=2 * rank, experts="all")
    ours = with_factors(
        copy.deepcopy(base), lambda model: attach_adapter(model, METHODS["lora"], lora)
    )
    due_logits, due = step(with_factors(base, lambda model: plain_peft(model, rank)))
    call_routed(ours.get_base_model())
    logits, grads = step(ours)
    torch.testing.assert_close(logits, due_logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == due.keys()
    assert len([name for name in grads if ".experts." in name]) == 8
    for name, grad in grads.items():
        assert float((grad - due[name]).norm() / due[name].norm()) < 1e-5, name


@pytest.mark.parametrize("sides", [QWEN, GPT_OSS], ids=lambda sides: sides["model_type"])
def test_all_weights_get_the_gradients_of_transformers(sides: dict[str, Any]) -> None:
    base = random_model(sides)
    due_logits, due = step(copy.deepcopy(base))
    call_routed(base)
    logits, grads = step(base)
    torch.testing.assert_close(logits, due_logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, due[name], rtol=1e-4, atol=1e-6, msg=name)


@use_experts_implementation
class _Normed(torch.nn.Module):
    """Experts whose results are normalised; transformers' loop is the reference."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.post_expert_norm, self.act_fn = torch.nn.LayerNorm(6), torch.nn.SiLU()


@pytest.mark.parametrize(
    "index",
    [
        [[1, 1]] * 5,  # all tokens to one expert
        [[2, 0]],  # one token, fewer than experts
        [[0, 2], [2, 0], [0, 2]],  # none to an expert
    ],
)
@pytest.mark.parametrize("normed", [True, False])
def test_any_number_of_tokens_reaches_an_expert(index: list[list[int]], normed: bool) -> None:
    torch.manual_seed(0)
    experts: Any = _Normed(AutoConfig.for_model("llama"))
    experts.has_post_expert_norm = normed
    chosen, hidden = torch.tensor(index), torch.randn(len(index), 6, requires_grad=True)
    shares = torch.rand(chosen.shape, requires_grad=True)
    found = routed_experts(experts, hidden, chosen, shares)
    due = torch.zeros(len(index), 6)
    for token, row in enumerate(index):
        for place, expert in enumerate(row):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            out = experts.post_expert_norm(out) if normed else out
            due[token] = due[token] + out * shares[token, place]
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-4)
    wanted = [hidden, shares, experts.gate_up_proj, experts.down_proj]
    gradients = torch.autograd.grad(found.square().sum(), wanted)
    expected = torch.autograd.grad(due.square().sum(), wanted)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-3)
    idle = [expert for expert in range(3) if expert not in chosen]
    assert all(gradients[2][expert].abs().max() == 0 for expert in idle)


def test_the_operators_are_as_torch_wants_them() -> None:
    rows = torch.randn(7, 4, requires_grad=True)
    weights = torch.randn(3, 5, 4).mT.requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    torch.library.opcheck(grouped_product, (rows, weights, ends))
    gradient = torch.randn(7, 5)
    torch.library.opcheck(grouped_gradient, (rows.detach(), gradient, ends))


def test_the_time_of_grouped_products_is_counted() -> None:
    rows, weights = torch.empty(10, 4, device="meta"), torch.empty(3, 4, 6, device="meta")
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    product = torch.ops.strixft.grouped_product.default
    cost = operator_cost(product, (rows, weights, ends), {}, product(rows, weights, ends))
    assert cost.flop == 2 * 10 * 4 * 6
    gradient = torch.ops.strixft.grouped_gradient.default
    args = (rows, torch.empty(10, 6, device="meta"), ends)
    assert operator_cost(gradient, args, {}, gradient(*args)).flop == 2 * 10 * 4 * 6


def test_a_layer_of_experts_is_one_graph() -> None:
    model = random_model(QWEN)
    call_routed(model)
    routed = next(iter(fused_experts(model).values()))
    hidden, index = torch.randn(9, 32), torch.randint(0, 6, (9, 2))
    inputs = hidden, index, torch.rand(9, 2)
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*inputs), routed(*inputs))


def kinds(sides: dict[str, Any], lora: Lora) -> dict[str, int]:
    """Layers in which each kind of module is trained."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sides))
    told = describe(attach_adapter(model, METHODS["lora"], lora))
    return {kind["name"]: kind["trained"] for kind in told["kinds"]}


def test_the_recipe_says_which_experts_are_adapted() -> None:
    sides, shared = SWEPT["qwen3_5_moe"]["text_config"], "mlp.shared_expert.down_proj"
    layers = sides["num_hidden_layers"]
    for value, (of_shared, of_routed) in {
        "none": (0, 0), "shared": (layers, 0), "all": (layers, layers),
    }.items():  # fmt: skip
        found = kinds(sides, Lora(experts=value))  # type: ignore[arg-type]
        assert (found[shared], found.get("mlp.experts", 0)) == (of_shared, of_routed), value
    assert kinds(QWEN, Lora(experts="all", layers=[1]))["mlp.experts"] == 1


def test_experts_that_cannot_be_adapted_say_so() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    with pytest.raises(RecipeError, match="experts: all, and the model has no experts") as caught:
        attach_adapter(model, METHODS["lora"], Lora(experts="all"))
    assert caught.value.settings == {"lora.experts": "shared"}
    for method, lora in (("lora", Lora(experts="all", dropout=0.1)), ("dora", Lora(experts="all"))):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN))
        with pytest.raises(RecipeError, match="PEFT cannot attach this adapter") as caught:
            attach_adapter(model, METHODS[method], lora)
        assert caught.value.fix == "lora.experts: shared"


# Experts in 4 bits.


def plain_experts(model: Any) -> Any:
    """A copy whose experts are parameters again, computed by transformers' own loop."""
    plain = copy.deepcopy(model)
    for path, part in packed_in(plain).items():
        experts, name = plain.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        delattr(experts, name)
        whole = part.written_out(slice(None), torch.float32)
        setattr(experts, name, torch.nn.Parameter(whole, requires_grad=False))
    plain.set_experts_implementation("eager")
    return plain


@pytest.mark.parametrize("sides", [QWEN, GPT_OSS], ids=lambda sides: sides["model_type"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_4_bit_experts_train_like_those_written_out(
    sides: dict[str, Any], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_model(sides)
    matrix = 4 * base.model.layers[0].mlp.experts.gate_up_proj[0].numel()
    monkeypatch.setattr(packed_experts, "PIECE_BYTES", 6 * matrix // pieces)
    weights = {name: weight.clone() for name, weight in base.named_parameters()}
    pack_shape(base, torch.float32)
    for path, part in packed_in(base).items():
        for name, tensor in packed(weights[path]).items():
            setattr(part, name, tensor)
    call_routed(base)
    lora = Lora(r=4, alpha=8, experts="all")

    def attach(model: Any) -> Any:
        return attach_adapter(model, METHODS["lora"], lora)

    due_logits, due = step(with_factors(plain_experts(base), plain_peft))
    logits, grads = step(with_factors(base, attach))
    torch.testing.assert_close(logits, due_logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == due.keys()
    assert len([name for name in grads if ".experts." in name]) == 8
    for name, grad in grads.items():
        assert float((grad - due[name]).norm() / due[name].norm()) < 1e-5, name


def test_4_bit_experts_are_those_of_bitsandbytes_alone() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 24), (2, 64, 32), (2, 160, 128)):
        weights = torch.randn(shape) * torch.linspace(0.1, 3, shape[1])[:, None]
        for kind in (torch.float32, torch.bfloat16):
            stored = packed(weights.to(kind))
            found = written_out([*stored.values()], torch.Size(shape), kind)
            for matrix, one in zip(weights.to(kind), found, strict=True):
                flat = quantize_4bit(matrix.flatten(), compress_statistics=True, quant_type="nf4")
                assert torch.equal(dequantize_4bit(*flat).flatten(), one.flatten())
            assert float((found - weights).norm() / weights.norm()) < 0.11
    assert not can_pack(torch.empty(3, 5, 7))


def test_the_packed_operator_is_as_torch_wants_it() -> None:
    part = PackedExperts((3, 16, 8), torch.float32)
    part.draw("cpu")
    rows, ends = torch.randn(7, 8, requires_grad=True), torch.tensor([2, 2, 7], dtype=torch.int32)
    torch.library.opcheck(packed_product, (rows, part.tensors, ends, [3, 16, 8], True, "nf4"))


def test_mxfp4_is_written_out_as_transformers_does() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)  # (E, D, C / 32, 16)
    scales = torch.randint(110, 130, (3, 10, 4), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        due = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (E, C, D)
        part = PackedExperts((3, 128, 10), dtype, "mxfp4", flipped=True)
        part.codes, part.scales = blocks.flatten(1), scales.flatten(1)
        assert torch.equal(part.written_out(slice(None), dtype), due)
        assert torch.equal(part[1], due[1])
        rows, ends = torch.randn(7, 128, dtype=dtype), torch.tensor([2, 2, 7], dtype=torch.int32)
        found = part.product(rows, ends, transposed=False)
        torch.testing.assert_close(found, grouped_product(rows, due, ends))


def test_a_4_bit_run_is_merged_as_it_was_trained(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", "qwen3_moe", SWEPT["qwen3_moe"])
    path = write_recipe(tmp_path, tmp_path / "model")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "qlora"}))
    run = open_run(path, tmp_path / "run")
    for stage in ("prepare", "plan", "train", "evaluate"):
        getattr(strixft, f"{stage}_recipe")(run)
    check = strixft.export_recipe(run, ("merged",)).figures["made"]["merged"]["check"]
    assert check["max_difference"] < 1e-5
    assert check["learned_kl"] > 0.01


# Tokens of each expert.


def test_tokens_of_experts_are_counted_without_padding() -> None:
    model = random_model(QWEN)
    call_routed(model)
    short, long = torch.arange(5) % 7, torch.arange(9) % 11
    due: dict[str, torch.Tensor] = {}
    for ids in (short, long):
        with torch.no_grad():
            found = model(input_ids=ids[None], output_router_logits=True).router_logits
        for layer, logits in enumerate(found):
            chosen = logits.topk(2).indices.flatten().bincount(minlength=6)
            name = f"model.layers.{layer}.mlp.experts"
            due[name] = due.get(name, 0) + chosen
    rows = [{"input_ids": ids.numpy(), "trained": np.ones(len(ids), bool)} for ids in (short, long)]
    with counting(fused_experts(model)) as counts, torch.no_grad():
        row_losses(model, rows, most_tokens=100)  # one batch, padded
    assert counts.shares() == {name: (one / one.sum()).tolist() for name, one in due.items()}


def test_idle_experts_are_named() -> None:
    shares = {"base": {"a": [0.5, 0.5, 0.0]}, "tuned": {"a": [0.75, 0.0, 0.25]}}
    (row,) = compare_experts(shares)
    assert (row["moved"], row["base"]["idle"], row["tuned"]["idle"]) == (0.5, [2], [1])
    told = says([row])
    assert told[0].startswith("Experts: 1 of 3 are reached by no held-out token (base 1)")
    assert told[1] == "No held-out token reaches in a: 1."
    assert says(compare_experts({"base": {}, "tuned": {}})) == []


# The trial of torch's grouped product.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_grouped_product_is_tried(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a CPU has torch's own, too; it is called here as on a GPU."""
    on_gpu = dtype == "bfloat16"
    monkeypatch.setattr(experts, "is_grouped", lambda *_: on_gpu and kernels.is_on(kernels.GROUPED))
    monkeypatch.setattr(trial, "SLOWER", float("inf"))
    figures = trial.measure_grouped("cpu", dtype, [(64, 96), (48, 64)])
    assert "problem" not in figures
    assert 0 < figures["error"] < figures["allowed_error"]


def test_a_wrong_grouped_product_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.nn.functional.grouped_mm
    monkeypatch.setattr(experts, "is_grouped", lambda *_: True)
    monkeypatch.setattr(experts, "grouped_mm", lambda *a, offs: whole(*a, offs=offs.clamp(max=97)))
    assert "problem" in trial.measure_grouped("cpu", "bfloat16", [(64, 96)])
