"""What is trained: told by kind and layer, watched for two updates, and refused where it is not."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import WriteRecipe
from peft.tuners.lora import LoraLayer
from test_train import trained
from torch import nn

from strixft.app.report import write_report
from strixft.catalog.methods import METHODS
from strixft.data.batches import Batch
from strixft.model.adapter import attach_adapter, decoder_layers
from strixft.plan.result import plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.schema import Lora, Train
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.step.update import TrainingStep
from strixft.support.errors import StageError, Stopped
from strixft.train.coverage import FirstUpdates, describe, not_finite, warnings_of
from strixft.train.loop import TrainingLoop
from strixft.train.stage import COVERAGE, train_recipe

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def a_model(targets: str | list[str] = "all-linear", method: str = "lora") -> Any:
    """A random Qwen 3.5 of four layers, of which only the last has attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="strixft")
    return attach_adapter(
        base, METHODS[method], Lora.model_validate({"r": 2, "target_modules": targets})
    )


def a_batch() -> Batch:
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    places = torch.tensor([3, 4, 5, 15, 16])
    labels = ids.flatten()[places + 1]
    return {"input_ids": ids, "positions": places, "labels": labels, "num_tokens": 24}


def proven(step: TrainingStep) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    watch = FirstUpdates(step, a_batch(), found.append)
    for _ in range(2):
        assert not found
        step.update([a_batch()] * 2, before_step=lambda *_: watch.before_step())
        watch.after_step()
    return found[0]


def test_a_run_tells_what_was_trained(tiny_run: Run) -> None:
    _, result = trained(tiny_run)
    told = result.figures["trained"]
    assert {kind["name"]: kind["trained"] for kind in told["kinds"]} == {
        **dict.fromkeys((f"self_attn.{name}" for name in ATTENTION), 2),
        **dict.fromkeys((f"mlp.{name}_proj" for name in ("gate", "up", "down")), 2),
    }
    assert told["moved"] == told["tensors"] == 28
    assert (told["layers_without"], told["unused"], told["unreached_experts"]) == ([], [], 0)
    assert told["adapter_changes"] > 0
    for page in (result._repr_html_(), write_report(tiny_run).read_text()):
        assert "28 of them moved in the first 2 updates" in html.unescape(page)
        assert "<td>mlp.gate_proj</td><td>2</td><td>2</td>" in page


@pytest.mark.parametrize("method", ["full", "dora"])
def test_other_methods_are_proven_too(method: str) -> None:
    model = a_model(method=method)
    told = describe(model)
    seen = proven(TrainingStep(model, Train()))
    assert told["layers"] == 4
    assert seen["moved"] == told["tensors"] > 40
    assert ("adapter_changes" in seen) == (method == "dora")


def test_a_hybrid_with_few_adapted_layers_is_told() -> None:
    """huggingface/peft#3554: 4 of 56 layers of a Nemotron-H were adapted, silently."""
    told = describe(a_model(ATTENTION))
    kinds = {kind["name"]: (kind["trained"], kind["layers"]) for kind in told["kinds"]}
    assert kinds["self_attn.q_proj"] == (1, 1)
    assert kinds["linear_attn.in_proj_qkv"] == (0, 3)
    (warning,) = warnings_of(told)
    assert warning.startswith("1 of 4 layers are trained: nothing is in 0, 1, 2, which have ")
    assert "linear_attn.in_proj_qkv" in warning
    assert not warnings_of(describe(a_model()))


def test_a_layer_that_lost_its_adapter_is_named() -> None:
    model = a_model()
    mlp: Any = decoder_layers(model)[2].mlp
    mlp.up_proj = mlp.up_proj.get_base_layer()
    with pytest.raises(StageError, match=r"have no adapter: model\.layers\.2\.mlp\.up_proj; noth"):
        describe(model)


def past_its_adapter(model: nn.Module, name: str) -> None:
    """As a fused kernel does that is given the weights of a layer."""
    for path, layer in model.named_modules():
        if path.endswith(name) and isinstance(layer, LoraLayer):
            layer.forward = layer.get_base_layer().forward


def test_an_adapter_that_is_read_past_stops_the_run() -> None:
    model = a_model()
    past_its_adapter(model, "linear_attn.out_proj")
    with pytest.raises(StageError, match="6 of 62 trained tensors got no gradient") as caught:
        proven(TrainingStep(model, Train()))
    assert "layers.0.linear_attn.out_proj.lora_A" in caught.value.problem
    kept = caught.value.settings["lora.target_modules"]
    assert "out_proj" not in kept
    assert "in_proj_qkv" in kept
    assert not describe(a_model(kept))["layers_without"]


def test_experts_that_no_token_reached_are_counted() -> None:
    model = a_model()
    past_its_adapter(model, "linear_attn.out_proj")
    step = TrainingStep(model, Train())
    named = [(n.replace(".out_proj.", ".experts.0.up."), w) for n, w in step.named_trainable()]
    renamed = mock.patch.object(step, "named_trainable", return_value=named)
    with renamed:
        seen = proven(step)
    assert (seen["unreached_experts"], seen["moved"]) == (6, 56)


def test_weights_that_do_not_move_stop_the_run() -> None:
    step = TrainingStep(a_model(), Train())
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(StageError, match="31 of 62 trained tensors did not move in 2 updates"):
        proven(step)


def test_an_adapter_that_changes_nothing_stops_the_run() -> None:
    step = TrainingStep(a_model(), Train())
    off: Any = contextlib.nullcontext
    with (
        mock.patch.object(step.model, "disable_adapter", off),
        pytest.raises(StageError, match="answers alike with its adapter and without it"),
    ):
        proven(step)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    step = TrainingStep(a_model(), Train())
    step.loss(a_batch(), 5).backward()
    weights: Sequence[nn.Parameter] = step.trainable()
    assert weights[1].grad is not None
    weights[1].grad[0, 0] = torch.nan
    name = step.named_trainable()[1][0]
    assert not_finite(step) == f" in 1 of 62 tensors: {name}"


def test_a_run_that_goes_on_proves_what_its_first_process_did_not(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(write_recipe(), tmp_path / "run")
    prepare_recipe(run), plan_recipe(run)
    right = TrainingLoop._finish_update

    def once(self: TrainingLoop, *args: Any) -> None:
        right(self, *args)
        self._is_asked = lambda: True

    monkeypatch.setattr(TrainingLoop, "_finish_update", once)
    with pytest.raises(Stopped):
        train_recipe(run)
    monkeypatch.setattr(TrainingLoop, "_finish_update", right)
    assert not (run.folder / "train" / COVERAGE).exists()
    figures = train_recipe(run).figures
    assert figures["first_update"] == 2
    assert figures["trained"]["moved"] == figures["trained"]["tensors"]
