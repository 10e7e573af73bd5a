"""Products of compiled layers: what the rewritten graphs compute, and how."""

import re
from typing import Any

import pytest
import torch
from adapted import RANK, SIDE, Linear, calls_of, needs_compiler, outcome, rewriting
from adapted import an_input as input_of
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from transformers import AutoConfig

from strixft.data.batches import collate
from strixft.model.load import random_model
from strixft.recipe.schema import Dataset, Recipe, Train
from strixft.step import layers
from strixft.step.graphs import writes_4bit_out
from strixft.step.layers import inductor
from strixft.step.matrix_products import MOST_FUSED_ROWS
from strixft.step.update import StepOptions, TrainingStep

MULTIPLIES = {torch.ops.aten.mm.default, torch.ops.aten.addmm_.default}
LLAMA = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TOKENS, MANY = 96, 4800


class Three(nn.Module):
    """As q, k and v: one input, one gradient of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(Linear() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.sin()
        q, k, v = (linear(normed) for linear in self.linears)
        attended: Tensor = x + (q * k.tanh()).cos() * v
        return attended


def an_input() -> Tensor:
    return input_of(TOKENS)


def test_thin_products_of_one_input_are_one_and_sums_are_added_up_in_place() -> None:
    torch.manual_seed(0)
    forward, backward = calls_of(Three().double(), an_input())
    assert forward["aten.mm.default"] == 1 + 3  # all three A at once, then each B
    assert forward["aten.addmm_.default"] == 3  # the bases, added to them
    # each B and its input; all three A, and their input; then the bases, added to that
    assert backward["aten.mm.default"] == 3 + 3 + 1 + 1
    assert backward["aten.addmm_.default"] == 3


def test_what_is_seen_elsewhere_too_is_not_written_over() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(SIDE, SIDE, bias=False)
            self.two = nn.Linear(SIDE, SIDE, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.one(x), self.two(x)
            result: Tensor = (first + second) * first.exp() + second.tanh()
            return result

    torch.manual_seed(0)
    forward, _ = calls_of(Seen().double(), an_input())
    assert forward["aten.addmm_.default"] == 0


def test_a_thin_product_that_another_one_needs_is_not_joined_with_it() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thin = nn.Parameter(torch.randn(TOKENS, RANK))

        def forward(self, x: Tensor) -> Tensor:
            matrix = x.flatten(0, 1) @ x.flatten(0, 1).T / SIDE  # (T, T)
            first = matrix @ self.thin
            return first + (matrix @ first.tanh()).sin()

    torch.manual_seed(0)
    forward, _ = calls_of(Chain().double(), an_input())
    assert forward["aten.mm.default"] == 3


def test_a_sum_that_broadcasts_is_left_as_it_is() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(SIDE, SIDE, bias=False)
            self.two = nn.Linear(SIDE, SIDE, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.one(x) + self.two(x[:, :1])
            return result

    torch.manual_seed(0)
    forward, _ = calls_of(Wide().double(), an_input())
    assert forward["aten.addmm_.default"] == 0


def test_a_sum_may_hold_another_one() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Linear(), Linear()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x.sin().cos())
            result: Tensor = x + self.second(nn.functional.silu(x) * x.cos())
            return result

    torch.manual_seed(0)
    forward, backward = calls_of(Residual().double(), an_input())
    assert forward["aten.addmm_.default"] == 2
    assert backward["aten.addmm_.default"] == 2


def test_4_bit_weights_are_written_out_right_before_they_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes")
    torch.compiler.reset()
    graphs: list[fx.Graph] = []
    monkeypatch.setattr(layers, "BACKEND", rewriting(graphs))
    recipe = Recipe(model="x", method="qlora", dataset=Dataset(source="none"))
    model = random_model(recipe, AutoConfig.for_model("llama", **LLAMA), "cpu", torch.float32)
    step = TrainingStep(model, recipe.train, StepOptions(compiled=True))
    row = {"input_ids": list(range(MOST_FUSED_ROWS + 1)), "trained": [True] * (MOST_FUSED_ROWS + 1)}
    step.update([collate([row])])
    forward, _, backward, _ = (
        graphs  # of the first layer, whose input has no gradient, and the next
    )
    assert order_of(forward) == "wmwmwm" + "wm" + "wmwm" + "wm"  # q, k, v; o; gate, up; down
    assert order_of(backward) == "wm" + "wmwm" + "wm" + "wmwmwm"  # down; gate, up; o; q, k, v


def order_of(graph: fx.Graph) -> str:
    """4-bit weights written out (w), and products with them (m)."""
    weights, order = set[fx.Node](), ""
    for node in graph.nodes:
        if writes_4bit_out(node.target):
            weights.add(node)
            order += "w"
        elif weights & {*node.all_input_nodes}:
            if node.target in MULTIPLIES:
                order += "m"
            else:
                weights.add(node)
    return order


@needs_compiler
def test_generated_code_computes_the_same() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    module, x = Three().double(), an_input()
    compiled = torch.compile(module, backend=inductor)
    wanted, found = outcome(module, module, x), outcome(compiled, module, x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generated_code_writes_4_bit_weights_out_as_bitsandbytes_does(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    torch.compiler.reset()
    weight = torch.randn(96, 192, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")

    def write_out(packed: Tensor, scales: Tensor) -> Tensor:
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales, 64, "nf4", [96, 192], dtype
        )
        return weight.clone()

    found = torch.compile(write_out, backend=inductor)(packed, state.absmax)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))


@needs_compiler
@pytest.mark.parametrize("stored", [torch.uint8, torch.bfloat16, torch.float32])
def test_weights_are_written_out_whatever_type_their_bytes_have(stored: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.compiler.reset()
    weight = torch.randn(96, 192)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", quant_storage=stored)

    def write_out(packed: Tensor, scales: Tensor) -> Tensor:
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            packed, scales, 64, "nf4", [96, 192], torch.float32
        )
        return weight.clone()

    found = torch.compile(write_out, backend=inductor)(packed, state.absmax)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))


class Twice(nn.Module):
    """Terms that are added twice, and a product with rows for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(SIDE, SIDE, bias=False) for _ in range(2))
        self.of_head = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        one, both = self.one(x), self.one(x) + self.two(x)
        heads = self.of_head(x.view(-1, SIDE // 16, 16)).view(x.shape)
        total: Tensor = one + one + self.two(x.cos()) + both + both + heads + self.two(x.sin())
        return total


@needs_compiler
def test_what_is_added_twice_counts_twice() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    module, x = Twice(), torch.randn(TOKENS, SIDE, requires_grad=True)
    compiled = torch.compile(module, backend=inductor, dynamic=False)
    results = module(x), compiled(x)
    gradients = [torch.autograd.grad(result.sin().sum(), x)[0] for result in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)


def _make_large(model: nn.Module) -> None:
    """So that gradients are no rounding errors."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(weight)
        elif "layers" not in name or "lora" in name:
            nn.init.normal_(weight, std=0.5)


@needs_compiler
def test_a_compiled_step_over_4_bit_weights_is_the_eager_one() -> None:
    pytest.importorskip("bitsandbytes")
    torch.compiler.reset()
    sides = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128}
    config = AutoConfig.for_model("llama", **sides, **heads)
    recipe = Recipe(model="x", method="qlora", dataset=Dataset(source="none"))
    rows: list[dict[str, Any]] = [
        {"input_ids": [(i * i + row) % 128 for i in range(400)], "trained": [True] * 400}
        for row in range(4)
    ]
    assert MOST_FUSED_ROWS < 4 * 400
    batch, found = collate(rows), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = random_model(recipe, config, "cpu", torch.float32)
        step = TrainingStep(model, Train(), StepOptions(compiled=compiled))
        _make_large(model)
        loss = step.loss(batch, len(batch["labels"]))
        found.append([loss.detach(), *torch.autograd.grad(loss, step.trainable())])
    assert float(found[1][0]) == pytest.approx(float(found[0][0]), rel=1e-5)
    for eager, generated in zip(found[0][1:], found[1][1:], strict=True):
        assert float(eager.norm()) > 1e-3
        assert float((eager - generated).norm() / eager.norm()) < 5e-3


@needs_compiler
def test_what_a_product_reads_in_another_order_is_written_in_that_order() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(SIDE, SIDE))

        def forward(self, x: Tensor) -> Tensor:
            heads = x.view(2, -1, 4, SIDE // 4).transpose(1, 2)  # (B, H, T, D)
            turned = (heads.sin() + heads).transpose(1, 2).reshape(-1, SIDE)
            return turned @ self.weight

    torch.manual_seed(0)
    torch.compiler.reset()
    module, x = Turned(), torch.randn(2, MANY // 2, SIDE)
    compiled = torch.compile(module, backend=inductor, dynamic=False)
    with torch.no_grad():
        found, code = run_and_get_code(compiled, x)
    torch.testing.assert_close(found, module(x))
    call = code[0][code[0].index("def call") :]
    large = [n for n in re.findall(r"= empty_strided_cpu\(\((.*?)\)", call) if f"{SIDE}" in n]
    assert len(large) == 2, large  # what is multiplied, and the product
