"""Kernels of a plan write what the code that inductor generates writes."""

import copy
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS
from strixft.data.batches import PackedShape, RowShape
from strixft.plan import inductor
from strixft.plan.cost import count_flop
from strixft.plan.inductor import Units
from strixft.plan.trace import trace_step
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe, Train

aten = torch.ops.aten
SMALL = 20_000
"""Elements below which a buffer is that of a weight or of an adapter."""
CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class _GeneratedError(Exception):
    """The code is there; it need not be compiled."""


def _graphs(method: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Forward and backward of a layer, as the compiler gets them."""
    found = []
    run = inductor._compile

    def keep(module: fx.GraphModule, values: Any) -> Any:
        found.append((copy.deepcopy(module), values))
        return run(module, values)

    monkeypatch.setattr(inductor, "_backend", inductor.make_backend(keep))
    recipe = Recipe(model="x", method=method, dataset=Dataset(source="none"), train=Train())
    shape = RowShape(1, 512, 511, PackedShape(512, 3, 300))
    config = AutoConfig.for_model("llama", **CONFIG)
    trace_step(Job.of(recipe, config, HOSTS["h200-141"]), shape, 0, 1)
    return found


def _written_by_inductor(
    module: fx.GraphModule, values: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Counter[int]:
    """Elements of each large buffer in the code for a CPU."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    code: list[str] = []

    def generate(lowering: Any) -> Any:
        code.append(str(lowering.codegen()[0].value))
        raise _GeneratedError

    monkeypatch.setattr(GraphLowering, "compile_to_module", generate)
    mode = FakeTensorMode()
    with mode:
        fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]
    for node in module.graph.nodes:
        node.meta.pop("val", None)
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    FakeTensorProp(module, mode).propagate(*fakes)
    with tracing(TracingContext(mode)), pytest.raises(Exception, match="_GeneratedError"):
        compile_fx_inner(module, fakes)
    return _large(code[0])


def _large(code: str) -> Counter[int]:
    """Each buffer that is allocated, or taken over from one that is done with."""
    fresh = re.findall(r"buf\d+ = empty_strided_cpu\(\((.*?)\)", code)
    shapes = re.findall(r"buf\d+ = reinterpret_tensor\(buf\d+, \((.*?)\).*# reuse", code)
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in fresh + shapes]
    return Counter(size for size in sizes if size >= SMALL)


def _written_by_plan(module: fx.GraphModule) -> Counter[int]:
    units = Units(module.graph)
    written = [
        node.meta["val"].numel()
        for unit in units.all()
        for node in unit
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and not units.stays_inside(node)
    ]
    return Counter(size for size in written if size >= SMALL)


def test_kernels_write_what_inductor_lets_them_write(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _graphs("lora", monkeypatch)
    wide = 512 * CONFIG["intermediate_size"]
    seen = []
    for module, values in graphs[:4]:
        planned = _written_by_plan(copy.deepcopy(module))[wide]
        generated = _written_by_inductor(module, values, monkeypatch)[wide]
        seen.append((planned, generated))
    assert len(seen) == 4
    assert all(planned == generated for planned, generated in seen), seen
    assert max(planned for planned, _ in seen) >= 5


@pytest.mark.parametrize("heads", [4, 8])
def test_padded_attention_counts_as_torch_counts_it(heads: int) -> None:
    def empty(heads: int, tokens: int) -> torch.Tensor:
        return torch.empty(2, heads, tokens, 64, device="meta")

    query, key = empty(heads, 16), empty(heads, 24)
    forward, backward = (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_backward.default,
    )
    sides = query.shape, key.shape, key.shape
    assert count_flop(forward, (query, key, key), {}, None) == sdpa_flop_count(*sides)
    counted = count_flop(backward, (query, query, key, key), {}, None)
    assert counted == sdpa_backward_flop_count(query.shape, *sides)
    shared = empty(2, 24)  # keys that heads share are read by each of them
    assert count_flop(forward, (query, shared, shared), {}, None) == sdpa_flop_count(*sides)
