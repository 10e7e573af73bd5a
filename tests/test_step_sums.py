"""Sums of products as one product: what is joined, what it computes, and that nothing is copied."""

import re
from collections import Counter

import pytest
import torch
from adapted import RANK, SIDE, Linear, an_input, calls_of, needs_compiler, outcome, rewriting
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from transformers import AutoConfig

from strixft.data.batches import collate
from strixft.model.load import random_model
from strixft.recipe.schema import Dataset, Recipe
from strixft.step import layers
from strixft.step.graphs import writes_4bit_out
from strixft.step.layers import inductor
from strixft.step.room import add_room
from strixft.step.update import StepOptions, TrainingStep

MULTIPLIES = {torch.ops.aten.mm.default, torch.ops.aten.addmm_.default}
VARIANTS = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MANY, FEW, WIDE = 4800, 96, 192
JOINED = 128
"""Columns of 80 and three adapters', from a multiple of 64 on."""


class Layer(nn.Module):
    """As a decoder layer: norms, three matrices of one input, a gated MLP."""

    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        self.three = nn.ModuleList(Linear(SIDE, SIDE, rank) for _ in range(3))
        self.gate, self.up = Linear(SIDE, WIDE, rank), Linear(SIDE, WIDE, rank)
        self.down = Linear(WIDE, SIDE, rank)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (linear(normed) for linear in self.three)
        x = x + (q * k.tanh()).cos() * v
        normed = self.norm(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return result

    def with_room(self) -> "Layer":
        """What is frozen has room for adapters' factors."""
        for linear in self.modules():
            if isinstance(linear, Linear):
                add_room(linear.base.weight)
        return self

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def calls_in(
    tokens: int, layer: nn.Module | None = None, *, joined: bool = True
) -> list[Counter[str]]:
    torch.manual_seed(0)
    return calls_of((layer or Layer()).double(), an_input(tokens), joined=joined)


def test_sums_of_many_tokens_are_one_product() -> None:
    forward, backward = calls_in(MANY)
    # what is kept for backward is copied, which is too much for the wide one
    assert forward["aten.addmm_.default"] == 1
    assert backward["aten.addmm_.default"] == 0
    # of x for three, of x for two, and what each of the five is multiplied by
    assert forward["strixft.beside.default"] == 2 + 5
    assert forward["strixft.fill.default"] == 2
    # each gradient of an input is one product: of three matrices, of two, of one
    assert backward["strixft.beside.default"] == 3 + 3
    assert backward["strixft.fill.default"] == 3


class Residual(nn.Module):
    """A sum within a sum: of the first, nothing has to be copied, of the second all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(SIDE, SIDE), Linear(SIDE, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x.sin().cos())
        result: Tensor = x + self.second(nn.functional.silu(x) * x.cos())
        return result


def test_a_sum_that_is_added_up_may_hold_one_that_is_joined() -> None:
    layer = Residual().double()
    add_room(layer.first.base.weight)
    forward, backward = calls_in(FEW, layer)
    assert forward["strixft.beside.default"] == 1  # of x; its weight has room
    assert forward["aten.addmm_.default"] == 1
    assert backward["aten.addmm_.default"] == 1


def test_sums_of_ranks_beyond_the_room_are_added_up() -> None:
    forward, backward = calls_in(MANY, Layer(rank=24))
    # 72 are too many for q, k and v; and the wide one
    assert forward["aten.addmm_.default"] == 3 + 1
    assert forward["strixft.beside.default"] == 1 + 2
    assert backward["aten.addmm_.default"] == 3


def test_sums_of_few_tokens_are_added_up_as_the_matrices_would_have_to_be_copied() -> None:
    forward, backward = calls_in(FEW)
    assert forward["strixft.beside.default"] == 0 == backward["strixft.beside.default"]
    assert forward["aten.addmm_.default"] == 6


def test_weights_with_room_are_never_copied() -> None:
    forward, backward = calls_in(FEW, Layer().double().with_room())
    # of x for three and of x for two; into them, and beside each of the five weights
    assert forward["strixft.beside.default"] == 2
    assert forward["strixft.fill.default"] == 2 + 5
    # the gradient of what the last matrix gets: itself, and below its one weight
    assert backward["strixft.beside.default"] == 1
    assert backward["strixft.fill.default"] == 1 + 1


def test_sums_are_added_up_where_that_is_faster() -> None:
    forward, backward = calls_in(MANY, joined=False)
    assert forward["strixft.beside.default"] == 0 == backward["strixft.beside.default"]
    assert forward["aten.addmm_.default"] == 6


def test_4_bit_weights_are_written_out_right_before_they_are_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes")
    from strixft.step.nf4_kernel import MOST_FUSED_ROWS

    torch.compiler.reset()
    graphs: list[fx.Graph] = []
    monkeypatch.setattr(layers, "BACKEND", lambda *, joined: rewriting(graphs, joined=joined))
    recipe = Recipe(model="x", method="qlora", dataset=Dataset(source="none"))
    model = random_model(recipe, AutoConfig.for_model("llama", **VARIANTS), "cpu", torch.float32)
    step = TrainingStep(model, recipe.train, StepOptions(compiled=True))
    row = {"input_ids": list(range(MOST_FUSED_ROWS + 1)), "trained": [True] * (MOST_FUSED_ROWS + 1)}
    step.update([collate([row])])
    forward, _, backward, _ = (
        graphs  # of the first layer, whose input has no gradient, and the next
    )
    assert order_of(forward) == "wmwmwm" + "wm" + "wmwm" + "wm"  # q, k, v; o; gate, up; down
    assert order_of(backward) == "wm" + "wwm" + "wm" + "wwwm"  # down; gate, up; o; q, k, v


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
def test_kernels_write_where_matrices_are_joined() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = Layer(), an_input(MANY, torch.float32)
    compiled = torch.compile(layer, backend=inductor(joined=True), dynamic=False)
    found, code = run_and_get_code(lambda: outcome(compiled, layer, x))
    for ours, theirs in zip(found, outcome(layer, layer, x), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    forward = code[0][code[0].index("def call") :]
    made = re.findall(r"= empty_strided_cpu\(\((.*?)\)", forward)
    assert made.count(f"2, {MANY // 2}, {JOINED}") == 2  # x once for three, once for two
    assert f"{MANY}, {SIDE + 3 * RANK}" not in made  # nor a copy of the thin ones
    assert forward.count("fill_in_place") == 2


@needs_compiler
def test_kernels_write_into_the_room_of_weights_and_nowhere_else() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = Layer().with_room(), an_input(FEW, torch.float32)
    before = [weight.detach().clone() for weight in layer.parameters()]
    compiled = torch.compile(layer, backend=inductor(joined=True), dynamic=False)
    for _ in range(3):  # the second time there is something in the room
        ours, theirs = outcome(compiled, layer, x), outcome(layer, layer, x)
        for found, due in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-4 * float(due.abs().max()))
    assert all(map(torch.equal, before, layer.parameters()))


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
    compiled = torch.compile(module, backend=inductor(joined=True), dynamic=False)
    with torch.no_grad():
        found, code = run_and_get_code(compiled, x)
    torch.testing.assert_close(found, module(x))
    call = code[0][code[0].index("def call") :]
    large = [n for n in re.findall(r"= empty_strided_cpu\(\((.*?)\)", call) if f"{SIDE}" in n]
    assert len(large) == 2, large  # what is multiplied, and the product
