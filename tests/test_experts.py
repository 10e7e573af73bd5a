"""Experts that a router chooses, beside transformers' own loop over experts and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sweep.models import SWEPT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from strixft.catalog.methods import METHODS
from strixft.model.adapter import attach_adapter
from strixft.model.experts import (
    call_routed,
    fused_experts,
    grouped_gradient,
    grouped_product,
    routed_experts,
)
from strixft.plan.cost import operator_cost
from strixft.recipe.schema import Lora
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
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    due_logits, due = step(with_factors(base, lambda model: get_peft_model(model, config)))
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


@use_experts_implementation(has_post_expert_norm=True)
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
    experts = next(iter(fused_experts(model).values()))
    hidden, index = torch.randn(9, 32), torch.randint(0, 6, (9, 2))
    inputs = hidden, index, torch.rand(9, 2)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*inputs), experts(*inputs))


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
