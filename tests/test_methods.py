"""Methods beside plain LoRA: values, gradients and updates are those of PEFT and bitsandbytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import needs_compiler
from conftest import WriteRecipe
from test_plan import PACKED, measured
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from strixft.catalog.methods import METHODS
from strixft.data.batches import collate
from strixft.guard.host import find_host
from strixft.model.adapter import AdapterDropout, attach_adapter
from strixft.model.source import load_config
from strixft.plan.choose import DataShape
from strixft.plan.dry_run import dry_run
from strixft.plan.result import plan_figures
from strixft.probe.job import Job
from strixft.recipe.load import check_recipe, load_recipe
from strixft.recipe.schema import Lora, Train
from strixft.step.compiler import allow_recompute
from strixft.step.layers import inductor
from strixft.step.optimizer import build_optimizer
from strixft.step.update import StepOptions, TrainingStep
from strixft.support.errors import RecipeError

SIDES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS_OF_PEFT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rs": True}, {"use_rslora": True}),
    ({"dropout": 0.3}, {"lora_dropout": 0.3}),
    ({"layers": [0, 2]}, {"layers_to_transform": [0, 2]}),
    (
        {"rs": True, "dropout": 0.1, "layers": "1-2", "r": 8},
        {"use_rslora": True, "lora_dropout": 0.1, "layers_to_transform": [1, 2], "r": 8},
    ),
]


def tiny(**sides: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIDES, **sides))


def peft_model(base: nn.Module, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**{**given, **settings}))


def draw_adapter(model: nn.Module) -> None:
    """Give B values: it is zero at first, and then A gets no gradient."""
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.02, generator=draw)


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)  # masks of dropout
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("ours", "theirs"), METHODS_OF_PEFT)
def test_an_adapter_has_the_values_and_gradients_of_peft(
    ours: dict[str, Any], theirs: dict[str, Any], method: str, tmp_path: Path
) -> None:
    lora = Lora.model_validate({"r": 4, "alpha": 8} | ours)
    mine: Any = attach_adapter(tiny(), METHODS[method], lora)
    plain = peft_model(tiny(), use_dora=method == "dora", **theirs)
    draw_adapter(mine)
    plain.load_state_dict(mine.state_dict())  # the same layers have an adapter
    (found, grads), (wanted, peft_grads) = map(loss_and_gradients, (mine, plain))
    assert torch.allclose(found, wanted, rtol=1e-6)
    assert grads.keys() == peft_grads.keys()
    for name, grad in peft_grads.items():
        assert torch.allclose(grads[name], grad, rtol=1e-4, atol=1e-7), name
    mine.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: said[name] for name in theirs} == theirs
    _assert_plain_peft_loads(tmp_path, mine)


def _assert_plain_peft_loads(folder: Path, trained: nn.Module, *, tied: bool = False) -> None:
    from peft import PeftModel

    ids = torch.arange(12).view(1, 12)
    again = PeftModel.from_pretrained(tiny(tie_word_embeddings=tied), folder).eval()
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (trained.eval(), again))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def updated(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int = 3) -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(updates):
        for _, weight in sorted(named_trainable(model).items()):
            weight.grad = torch.randn(weight.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_has_the_groups_and_the_updates_of_peft(method: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    ours: Any = attach_adapter(tiny(), METHODS[method], Lora(r=4, alpha=8))
    theirs = copy.deepcopy(ours)
    train = Train(learning_rate=1e-3, lora_plus_ratio=16)
    updated(ours, build_optimizer(named_trainable(ours), train))
    updated(
        theirs,
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0
        ),
    )
    for name, weight in named_trainable(theirs).items():
        assert torch.allclose(named_trainable(ours)[name], weight, rtol=1e-5, atol=1e-8), name


def test_adamw_8bit_is_that_of_bitsandbytes_and_goes_on_bit_for_bit() -> None:
    from bitsandbytes.optim import AdamW8bit

    lora = Lora(r=64, alpha=64)  # A has 4,096 numbers: smaller tensors keep 32 bits
    ours, whole, stopped = (attach_adapter(tiny(), METHODS["lora"], lora) for _ in range(3))
    for model in (whole, stopped):
        model.load_state_dict(ours.state_dict())
    train = Train(learning_rate=1e-3, optimizer="adamw-8bit")
    theirs = AdamW8bit(named_trainable(whole).values(), lr=1e-3, weight_decay=0.0)
    mine = build_optimizer(named_trainable(ours), train)
    updated(ours, mine)
    updated(whole, theirs)
    kinds = {s["state1"].dtype for s in mine.state.values()}
    assert kinds == {torch.uint8, torch.float32}
    for name, weight in named_trainable(whole).items():
        assert torch.equal(named_trainable(ours)[name], weight), name
    first = build_optimizer(named_trainable(stopped), train)
    updated(stopped, first)
    resumed = build_optimizer(named_trainable(stopped), train)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    updated(stopped, resumed)
    updated(ours, mine)
    for name, weight in named_trainable(stopped).items():
        assert torch.equal(named_trainable(ours)[name], weight), name


def test_moments_in_8_bits_are_refused_where_weights_are_bf16() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(RecipeError, match="loses updates") as caught:
        build_optimizer({"weight": weight}, Train(optimizer="adamw-8bit"))
    assert caught.value.settings == {"train.optimizer": "adamw"}


@pytest.mark.parametrize(
    "options", [StepOptions(recomputed_layers=2), StepOptions(elementwise=True)]
)
def test_recomputed_layers_drop_what_they_dropped_before(options: StepOptions) -> None:
    """The mask of forward is drawn again in backward."""
    rows = [{"input_ids": list(range(5, 20)), "trained": [False, *[True] * 14]}]
    lora = Lora(r=4, alpha=8, dropout=0.5)
    found: list[list[torch.Tensor]] = []
    base: Any = attach_adapter(tiny(), METHODS["lora"], lora)
    draw_adapter(base)
    for chosen in (StepOptions(), options, StepOptions()):
        step = TrainingStep(copy.deepcopy(base), Train(), chosen)
        assert step.dropout == 0  # the model itself has none
        torch.manual_seed(7 + len(found) // 2)
        step.loss(collate(rows), 14).backward()
        found.append([torch.as_tensor(weight.grad) for weight in step.trainable()])
    kept, again, other = found
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(kept, again, strict=True))
    assert not torch.equal(kept[0], other[0])  # another seed drops others


COUNTED: list[dict[str, Any]] = [
    {"lora": {"rs": True, "layers": [1]}},
    {"lora": {"dropout": 0.1}},
    {"lora": {"dropout": 0.1}, "method": "dora"},
    {"lora": {"r": 64}, "train": {"optimizer": "adamw-8bit", "lora_plus_ratio": 16}},
    {"lora": {"modules_to_save": ["embed_tokens"]}},  # tied to the head
]


@pytest.mark.parametrize("sections", COUNTED)
@pytest.mark.parametrize("recomputed_layers", [0, 1])
def test_the_plan_counts_it(
    sections: dict[str, Any], recomputed_layers: int, write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(**sections))
    job = Job.of(recipe, load_config(recipe), find_host("cpu"))
    found = dry_run(job, PACKED, recomputed_layers)
    peak, resident = measured(recipe, PACKED, recomputed_layers)
    assert found.peak_bytes == pytest.approx(peak, rel=0.001)
    assert found.resident_bytes == pytest.approx(resident, rel=0.001)


def test_max_steps_is_the_number_of_updates(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(train={"max_steps": 7, "epochs": 1}))
    data = DataShape(256, lengths=[100] * 10, trained=[50] * 10)  # five updates an epoch
    assert data.rows_per_update(recipe) == 2
    assert [data.updates(recipe, rows) for rows in (1, 2)] == [7, 7]
    assert data.num_rows(recipe, 1) == 14
    assert plan_figures(recipe, "h200-141")["updates"] == 7


def test_layers_that_are_not_there_are_told(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(lora={"layers": "1-2"}))
    with pytest.raises(RecipeError, match="names layer 2, and the model's last one is 1") as caught:
        plan_figures(recipe, "h200-141")
    assert "0 to 1" in caught.value.fix


@pytest.mark.parametrize(
    ("section", "setting", "value", "told"),
    [
        ("lora", "dropout", 1, "less than 1"),
        ("lora", "layers", "9-3", "at least one layer"),
        ("lora", "layers", "early", "'all'"),
        ("lora", "layers", [-1], "0 or more"),
        ("lora", "rs", "often", "true or false"),
        ("train", "max_steps", 0, "1 or more"),
        ("train", "lora_plus_ratio", 0, "more than 0"),
        ("train", "optimizer", "lion", "adamw-8bit"),
    ],
)
def test_bad_values_are_told(section: str, setting: str, value: Any, told: str) -> None:
    data = {"model": "x", "dataset": {"source": "x"}, section: {setting: value}}
    with pytest.raises(RecipeError, match=f"{section}.{setting}") as caught:
        check_recipe(data, name="recipe")
    assert told in caught.value.problem


SAVED: list[tuple[bool, list[str]]] = [
    (False, ["lm_head"]),
    (False, ["embed_tokens", "lm_head"]),
    (True, ["embed_tokens"]),
    (True, ["lm_head"]),
    (False, ["input_layernorm"]),
]


@pytest.mark.parametrize(("tied", "names"), SAVED)
def test_modules_that_are_saved_train_as_with_peft(
    tied: bool, names: list[str], tmp_path: Path
) -> None:
    """Tied matrices stay one."""
    lora = Lora(r=4, alpha=8, modules_to_save=names)
    ours: Any = attach_adapter(tiny(tie_word_embeddings=tied), METHODS["lora"], lora)
    theirs = peft_model(
        tiny(tie_word_embeddings=tied), modules_to_save=names, ensure_weight_tying=tied
    )
    theirs.load_state_dict(ours.state_dict())
    rows = [{"input_ids": list(range(5, 20)), "trained": [False, *[True] * 14]}]
    step = TrainingStep(ours, Train(learning_rate=1e-3))
    assert any("modules_to_save" in name for name, _ in step.named_trainable())
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    ids = torch.tensor([rows[0]["input_ids"]])
    for _ in range(3):
        found = step.update([collate(rows)])
        wanted = theirs.train()(input_ids=ids, labels=ids).loss
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(found, wanted, rtol=1e-5)
    for name, weight in named_trainable(theirs).items():
        assert torch.allclose(named_trainable(ours)[name], weight, rtol=1e-3, atol=2e-5), name
    ours.save_pretrained(tmp_path)
    _assert_plain_peft_loads(tmp_path, ours, tied=tied)


def test_no_group_of_weights_is_empty() -> None:
    """A schedule and an optimizer that count empty groups differently are out of step.

    Of the kind of OpenRLHF's pull request 1253.
    """
    whole = build_optimizer(dict(tiny().named_parameters()), Train(lora_plus_ratio=16))
    assert [len(group["params"]) > 0 for group in whole.param_groups] == [True]


class _Dropping(nn.Module):
    """A layer whose gradient is zero exactly where it dropped."""

    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.drop = AdapterDropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.drop(nn.functional.silu(x))
        return dropped * 2


@needs_compiler
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_compiled_layers_go_back_through_the_mask_that_they_drew(is_recomputed: bool) -> None:
    """Of the kind of pytorch's issue 190758 and of PEFT's issue 3020."""
    torch.compiler.reset()
    allow_recompute(elementwise=True)
    layer: Any = torch.compile(_Dropping(), backend=inductor, dynamic=False)
    x = torch.full((64, 64), 0.5, requires_grad=True)
    torch.manual_seed(3)
    found = checkpoint(layer, x, use_reentrant=False) if is_recomputed else layer(x)
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(found == 0, x.grad == 0)
    assert 0.4 < float((found == 0).float().mean()) < 0.6
    torch.manual_seed(3)
    assert torch.equal(found, layer(x))  # a resumed run draws the same
