"""The gated delta rule as one operator, beside transformers' own path; documents apart."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from strixft.evaluate.generate import left_padded
from strixft.model import delta_rule
from strixft.model.delta_rule import INSIDE, RESET, gated_delta_rule, short_convolution
from strixft.model.kernels import guard_kernels
from strixft.plan.inside import look_inside
from strixft.step.layers import _policy
from strixft.step.memory_tracker import MemoryTracker

PLAIN: Any = qwen.torch_chunk_gated_delta_rule
"""Transformers' own path."""

LENGTHS = (40, 3, 70, 64, 23)
"""Documents of a row: within a chunk of 64, over its end, a whole one."""


def an_input(
    length: int, *, heads: int = 4, key_heads: int = 2, rows: int = 2, seed: int = 0
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(rows, length, key_heads, 16, generator=draw) for _ in range(2))
    value = torch.randn(rows, length, heads, 24, generator=draw)
    gate, beta = (torch.rand(rows, length, heads, generator=draw) for _ in range(2))
    return [one.requires_grad_() for one in (query, key, value, -3 * gate, beta)]


def results(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    copies = [one.detach().clone().requires_grad_() for one in inputs]
    output = function(*copies)
    draw = torch.Generator().manual_seed(1)
    (output * torch.randn(output.shape, generator=draw)).sum().backward()
    return [output.detach(), *(one.grad for one in copies if one.grad is not None)]


def plain(*inputs: Tensor) -> Tensor:
    output: Tensor = PLAIN(*inputs, use_qk_l2norm_in_kernel=True)[0]
    return output


def token_by_token(*inputs: Tensor) -> Tensor:
    query, key, value, gate, beta = inputs
    run: Any = qwen.torch_recurrent_gated_delta_rule
    output: Tensor = run(
        query, key, value, g=gate, beta=beta,
        initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True,
    )[0]  # fmt: skip
    return output


def rule(*inputs: Tensor) -> Tensor:
    query, key, value, gate, beta = inputs
    return gated_delta_rule(query, key, value, gate, beta, unit=True)


def rule_by_documents(*inputs: Tensor) -> Tensor:
    query, key, value, gate, beta = inputs
    return gated_delta_rule(query, key, value, gate, beta, documents(), unit=True)


def each_alone(*inputs: Tensor) -> Tensor:
    parts = zip(*(one.split(LENGTHS, 1) for one in inputs), strict=True)
    return torch.cat([plain(*part) for part in parts], 1)


def documents() -> Tensor:
    return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).repeat(2, 1)


def assert_alike(found: list[Tensor], due: list[Tensor]) -> None:
    assert len(found) == len(due) == 6
    for one, other in zip(found, due, strict=True):
        assert (one - other).norm() < 1e-5 * max(1.0, float(other.norm()))  # some are zero


@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_it_is_the_rule_that_transformers_computes(length: int, key_heads: int) -> None:
    inputs = an_input(length, key_heads=key_heads)
    found = results(rule, inputs)
    assert_alike(found, results(plain, inputs))


def test_documents_of_a_row_are_each_as_alone() -> None:
    inputs = an_input(sum(LENGTHS))
    found = results(rule_by_documents, inputs)
    assert_alike(found, results(each_alone, inputs))
    leaking = results(plain, inputs)[0]
    assert (found[0] - leaking).norm() > 0.03 * leaking.norm()


def test_a_kernel_that_knows_no_documents_keeps_them_apart_too() -> None:
    """The gate alone does it: any kernel gets a decay of exp(-40) at a document's first token."""
    inputs = an_input(sum(LENGTHS))

    def through_transformers(*tensors: Tensor, unit: bool) -> Tensor:
        output: Tensor = PLAIN(*tensors, use_qk_l2norm_in_kernel=unit)[0]
        return output

    before = delta_rule.kernel[:]
    delta_rule.kernel[:] = [through_transformers]
    try:
        found = results(rule_by_documents, inputs)
    finally:
        delta_rule.kernel[:] = before
    due = results(each_alone, inputs)
    for one, other in zip(found, due, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_like_keys_that_are_written_whole_lose_no_digits() -> None:
    """All keys alike, nothing forgotten: a sum of powers would lose all digits here."""
    query, key, value, gate, beta = an_input(128, key_heads=4)
    inputs = [query, torch.ones_like(key), value, gate * 0, torch.ones_like(beta)]
    due = results(plain, inputs)
    for one, other in zip(results(rule, inputs), due, strict=True):
        assert (one - other).norm() < 1e-5 * max(10.0, float(other.norm()))


def test_a_compiled_layer_calls_one_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    inputs = an_input(150)
    run = torch.compile(rule, backend=backend, fullgraph=True)
    assert_alike(results(run, inputs), results(plain, inputs))
    (module,) = graphs
    called = [str(node.target) for node in module.graph.nodes if "gated" in str(node.target)]
    assert len(called) == 1


def test_layers_that_compute_elementwise_operations_again_keep_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs once forward, and once inside its backward pass."""
    calls: list[int] = []

    def counted(*tensors: Tensor, unit: bool) -> Tensor:
        calls.append(1)
        return delta_rule.chunked(*tensors, unit=unit)

    monkeypatch.setattr(delta_rule, "kernel", [counted])
    again = partial(create_selective_checkpoint_contexts, _policy)
    layer = partial(checkpoint, lambda *all_: rule(*(2 * one for one in all_)).sin())
    layer(*an_input(70), use_reentrant=False, context_fn=again).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("function", INSIDE)
def test_a_plan_sees_what_it_holds_inside(function: Any) -> None:
    inputs = [one.detach().contiguous() for one in an_input(192, rows=3)]
    args = (*inputs, True)
    if "backward" in str(function):
        args = (torch.ones_like(inputs[2]), *args)
    tracker = MemoryTracker()
    for one in (one for one in args if isinstance(one, Tensor)):
        tracker.watch(one, "weights")
    before = tracker.live_bytes
    with tracker, torch.no_grad():
        result = INSIDE[function](*args)
    found = result if isinstance(result, tuple) else (result,)
    given = sum(one.untyped_storage().nbytes() for one in found)
    planned = look_inside(function, args)
    assert planned.peak_bytes == tracker.peak_bytes - before - given
    assert planned.cost.flop > 0


def test_a_convolution_ends_at_a_documents_begin() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, sum(LENGTHS), generator=draw)
    weight, bias = torch.randn(5, 4, generator=draw), torch.randn(5, generator=draw)
    found = short_convolution(hidden, weight, bias, documents())
    parts = hidden.split(LENGTHS, 2)
    due = torch.cat([qwen.causal_conv1d_fn.__wrapped__(one, weight, bias) for one in parts], 2)
    assert torch.allclose(found, due, atol=1e-5)


@pytest.mark.parametrize("gate", [-50.0, -1e30, -float("inf")])
def test_a_gate_that_forgets_all_spoils_no_other_token(gate: float) -> None:
    """Sums of logarithms within a chunk gave NaN, or lost the digits of later tokens.

    pytorch/executorch#21417; transformers' own path over chunks does the same.
    """
    inputs = an_input(150)
    with torch.no_grad():
        inputs[3][:, ::5] = gate
    found, due = results(rule, inputs), results(token_by_token, inputs)
    for one, other in zip(found, due, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_tokens_of_zeros_have_finite_gradients() -> None:
    """A padded token's key is zero, and so is its length (AI-Hypercomputer/maxtext#5295)."""
    inputs = an_input(100)
    with torch.no_grad():
        for one in inputs[:3]:
            one[:, :70] = 0
    found, due = results(rule, inputs), results(token_by_token, inputs)
    for one, other in zip(found, due, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_a_gate_that_forgets_by_itself_is_a_reset() -> None:
    inputs = an_input(100)
    with torch.no_grad():
        inputs[3][:, ::7] = 1.5 * RESET
    due = results(plain, inputs)
    found = results(rule, inputs)
    for one, other in zip(found, due, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


SIDES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
DELTA = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
CONVOLVED = {"layer_types": ["conv", "conv", "full_attention"], "block_auto_adjust_ff_dim": False}


@pytest.mark.parametrize(("kind", "own"), [("qwen3_5_text", DELTA), ("lfm2", CONVOLVED)])
def test_what_goes_on_with_a_state_is_what_was_trained(kind: str, own: dict[str, Any]) -> None:
    """Decoding from a state, with padding on the left, beside each whole row without a state.

    huggingface/transformers#46190 (a state that is not the row's), #46773 (padding that flows into
    convolution and state). A prompt is shorter than the convolution, one longer than a chunk.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIDES, **own)).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2) if weight.ndim > 1 else None
    guard_kernels(model)
    prompts = [torch.randint(3, 96, (length,)).tolist() for length in (2, 70, 33)]
    ids, mask = left_padded(prompts, 0)
    produced = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    stepwise = torch.stack(produced.logits, 1)  # (B, 5, V)
    for prompt, row, found in zip(prompts, produced.sequences, stepwise, strict=True):
        whole = row[-len(prompt) - 5 :]
        with torch.no_grad():
            due = model(input_ids=whole[None], use_cache=False).logits[0, -6:-1]
        torch.testing.assert_close(found, due, rtol=1e-3, atol=1e-3)
