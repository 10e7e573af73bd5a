"""The training step: its loss, its gradients and what it keeps."""

import copy
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from strixft.attention.backends import BACKENDS, cannot, known_backends
from strixft.catalog.methods import METHODS
from strixft.data.batches import PAD, Batch, PackedShape, collate
from strixft.model.adapter import attach_adapter, base_of
from strixft.model.architecture import architecture_of, linear_head
from strixft.model.load import random_model
from strixft.model.source import model_source
from strixft.recipe.schema import Dataset, Lora, Recipe, Train
from strixft.step.loss import (
    CHUNK_ELEMENTS,
    chunk_rows,
    chunked_cross_entropy,
    rows_of_whole_chunks,
)
from strixft.step.memory_tracker import MemoryTracker, part
from strixft.step.update import StepOptions, TrainingStep
from strixft.support.errors import RecipeError

ROWS: list[dict[str, Any]] = [
    {
        "input_ids": [5, 6, 7, 8, 9, 10, 11],
        "trained": [False, False, True, True, False, True, True],
    },
    {"input_ids": [12, 13, 14], "trained": [False, True, True]},
]
TRAIN = Train(learning_rate=2e-4, max_grad_norm=1.0)
LORA = Lora(r=4, alpha=8)
VARIANTS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIG = AutoConfig.for_model("llama", **VARIANTS, initializer_range=0.1)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder: Path, method: str = "lora") -> torch.nn.Module:
    torch.manual_seed(1)
    return attach_adapter(load(folder), METHODS[method], LORA)


def padded_labels(batch: Batch) -> Tensor:
    """Labels as transformers wants them: (B, T), -100 where nothing is trained."""
    labels = torch.full_like(batch["input_ids"].flatten(), -100)
    labels[batch["positions"] + 1] = batch["labels"]
    return labels.view_as(batch["input_ids"])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 7, CHUNK_ELEMENTS])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunks_change_neither_loss_nor_gradients(
    softcap: float | None, chunk: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strixft.step.loss.CHUNK_ELEMENTS", chunk * 50)
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True) if has_bias else None
    inputs = [one for one in (hidden, weight, bias) if one is not None]
    labels = torch.randint(0, 50, (23,))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 3, inputs)
    loss = chunked_cross_entropy(hidden, weight, labels, softcap, bias=bias)
    found = torch.autograd.grad(loss / 3, inputs)
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["phi", "gptj", "codegen"])
@pytest.mark.parametrize("saved", [None, [], ["lm_head"]])
def test_a_head_with_a_bias_gives_the_loss_and_gradients_of_transformers(
    model_type: str, saved: list[str] | None
) -> None:
    """In full training (None), with an adapter, and with one beside a head that is trained."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sides = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "rotary_dim": 8}
    config = AutoConfig.for_model(model_type, **sides, vocab_size=64, intermediate_size=48)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(plain.lm_head.bias)
    torch.nn.init.normal_(plain.lm_head.weight)
    lora = Lora(r=4, alpha=8, modules_to_save=saved or [])
    ours: Any = copy.deepcopy(plain)
    ours = attach_adapter(ours, METHODS["full" if saved is None else "lora"], lora)
    assert linear_head(base_of(ours)) is not None
    batch = collate(ROWS)
    ids = batch["input_ids"]
    expected = plain(ids, attention_mask=ids != PAD, labels=padded_labels(batch)).loss
    loss = TrainingStep(ours, TRAIN).loss(batch, len(batch["labels"]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if saved == []:
        return
    expected.backward()
    loss.backward()
    head = base_of(ours).get_output_embeddings()
    assert torch.allclose(head.bias.grad, plain.lm_head.bias.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_chunks_are_equal_and_bounded() -> None:
    assert chunk_rows(1000, CHUNK_ELEMENTS) == 1
    assert chunk_rows(100, CHUNK_ELEMENTS // 32) == 25
    assert chunk_rows(5, 10) == 5


def peft_losses(model: Any, batches: list[Batch], lora: Lora) -> Iterator[float]:
    """Updates of plain transformers + PEFT, one a batch of padded rows."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(model, config).train()
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    for batch in batches:
        ids = batch["input_ids"]
        loss = theirs(input_ids=ids, attention_mask=ids != PAD, labels=padded_labels(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def test_the_loss_is_that_of_transformers_and_peft(tiny_model: Path) -> None:
    """Five updates at learning rate 2e-4, float32."""
    batches = [collate(ROWS)] * 5
    step = TrainingStep(adapted(tiny_model), TRAIN)
    for batch, expected in zip(batches, peft_losses(load(tiny_model), batches, LORA), strict=True):
        assert float(step.update([batch])) == pytest.approx(expected, rel=1e-4)


def test_the_step_over_4_bit_weights_is_that_of_transformers_and_peft(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    batches = [collate(ROWS)] * 5
    step = TrainingStep(load_method(tiny_model, "qlora", LORA), TRAIN)
    for batch, expected in zip(batches, peft_losses(plain, batches, LORA), strict=True):
        assert float(step.update([batch])) == pytest.approx(expected, rel=1e-5)


def chat_rows(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows of 24 to 48 tokens, the later half of each trained; the tokens are drawn."""
    rng = random.Random(0)
    lengths = [rng.randrange(24, 49) for _ in range(count)]
    return [
        {
            "input_ids": [rng.randrange(3, vocabulary) for _ in range(length)],
            "trained": [place >= length // 2 for place in range(length)],
        }
        for length in lengths
    ]


def packed(rows: list[dict[str, Any]]) -> Batch:
    """The same rows in one, closed off from each other."""
    row = {name: [x for row in rows for x in row[name]] for name in ("input_ids", "trained")}
    lengths = [len(row["input_ids"]) for row in rows]
    return collate([{**row, "lengths": lengths}], PackedShape(100, len(rows) + 1, 100))


def test_fifty_updates_follow_transformers_and_peft(tiny_model: Path) -> None:
    """Ours packs two chats into a row and recomputes a layer; theirs pads them.

    On the embedded model, in minutes: `STRIXFT_PARITY_MODEL=embedded:smollm2-135m`.
    """
    named = os.environ.get("STRIXFT_PARITY_MODEL")
    folder = Path(model_source(named)) if named else tiny_model
    plain, ours = load(folder), adapted(folder)
    rows = chat_rows(100, plain.config.vocab_size)
    pairs = [rows[start : start + 2] for start in range(0, 100, 2)]
    step = TrainingStep(ours, TRAIN, StepOptions(attention="sdpa-packed", recomputed_layers=1))
    expected = peft_losses(plain, [collate(pair) for pair in pairs], LORA)
    found = [(float(step.update([packed(pair)])), next(expected)) for pair in pairs]
    off = [abs(ours - theirs) / theirs for ours, theirs in found]
    assert len(off) == 50
    assert max(off) < 1e-4


def test_the_losses_stay_what_they_were(tiny_model: Path) -> None:
    step = TrainingStep(adapted(tiny_model), Train(learning_rate=2e-3))
    losses = [float(step.update([collate(ROWS)])) for _ in range(4)]
    assert losses == pytest.approx(PINNED, rel=1e-4)


PINNED = [10.739987, 10.675644, 10.610285, 10.546910]


def test_padding_changes_nothing(tiny_model: Path) -> None:
    step = TrainingStep(adapted(tiny_model), TRAIN)
    together = step.loss(collate(ROWS), 6)
    alone = sum(float(step.loss(collate([row]), 6).detach()) for row in ROWS)
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)


def test_accumulation_is_one_large_batch(tiny_model: Path) -> None:
    small, large = (TrainingStep(adapted(tiny_model), TRAIN) for _ in range(2))
    for _ in range(3):
        a = small.update([collate([row]) for row in ROWS])
        b = large.update([collate(ROWS)])
        assert float(a) == pytest.approx(float(b), rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "phi", "stablelm", "starcoder2"])
def test_no_value_is_dropped_in_training(kind: str) -> None:
    config = AutoConfig.for_model(kind, **VARIANTS | {"num_key_value_heads": 2})
    names = [name for name in config.to_dict() if "drop" in name and "summary" not in name]
    config.update(dict.fromkeys(names, 0.5))
    model = AutoModelForCausalLM.from_config(config)
    batch = collate(ROWS)
    ids, labels = batch["input_ids"], padded_labels(batch)
    with torch.no_grad():
        expected = float(model.eval()(input_ids=ids, labels=labels).loss)
    step = TrainingStep(model, TRAIN)
    assert step.dropout == 0.5
    assert float(step.update([batch])) == pytest.approx(expected, rel=1e-5)


def test_recomputed_layers_give_the_same_losses(tiny_model: Path) -> None:
    keep = TrainingStep(adapted(tiny_model), TRAIN)
    again = TrainingStep(adapted(tiny_model), TRAIN, StepOptions(recomputed_layers=1))
    for _ in range(3):
        assert float(keep.update([collate(ROWS)])) == float(again.update([collate(ROWS)]))


@pytest.mark.parametrize("method", [*METHODS])
def test_products_are_kept_and_the_rest_is_computed_again(method: str) -> None:
    recipe = Recipe(model="none", method=method, dataset=Dataset(source="none"), lora=LORA)
    losses = []
    for elementwise in (False, True):
        torch.manual_seed(1)
        model = random_model(recipe, CONFIG, "cpu", torch.float32)
        train = Train(learning_rate=1e-2)
        step = TrainingStep(model, train, StepOptions(elementwise=elementwise))
        losses.append([float(step.update([collate(ROWS)])) for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("attention", ["sdpa-packed", "eager"])
def test_packed_rows_train_as_rows_alone(attention: str, tiny_model: Path) -> None:
    packed = {
        "input_ids": [token for row in ROWS for token in row["input_ids"]],
        "trained": [flag for row in ROWS for flag in row["trained"]],
        "lengths": [len(row["input_ids"]) for row in ROWS],
    }
    together = collate([packed], PackedShape(16, documents=4, longest=7))
    alone = TrainingStep(adapted(tiny_model), TRAIN)
    one_row = TrainingStep(adapted(tiny_model), TRAIN, StepOptions(attention=attention))
    for _ in range(5):
        expected = float(alone.update([collate(ROWS)]))
        assert float(one_row.update([together])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize(
    "options", [StepOptions(elementwise=True), StepOptions(recomputed_layers=1)]
)
def test_compiled_layers_train_as_eager_ones(options: StepOptions, tiny_model: Path) -> None:
    torch.compiler.reset()
    eager = TrainingStep(adapted(tiny_model), TRAIN)
    compiled = TrainingStep(adapted(tiny_model), TRAIN, replace(options, compiled=True))
    for _ in range(3):
        expected = float(eager.update([collate(ROWS)]))
        assert float(compiled.update([collate(ROWS)])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, tiny_model: Path) -> None:
    if METHODS[method].base != "native":
        pytest.importorskip("bitsandbytes")
    model = load_method(tiny_model, method)
    step = TrainingStep(model, Train(learning_rate=5e-3))
    losses = [float(step.update([collate(ROWS)])) for _ in range(4)]
    assert losses[-1] < losses[0]


def load_method(folder: Path, method: str, lora: Lora | None = None) -> torch.nn.Module:
    from strixft.model.load import build
    from strixft.recipe.schema import Dataset, Recipe

    recipe = Recipe(
        model=str(folder), method=method, lora=lora or Lora(), dataset=Dataset(source="none")
    )
    torch.manual_seed(1)
    return build(recipe, "cpu", torch.float32)


def test_an_unknown_family_takes_its_own_head(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingStep(adapted(tiny_model), TRAIN)
    chunked = float(step.loss(collate(ROWS), 6).detach())
    monkeypatch.setattr(base_of(step.model).config, "model_type", "never-heard-of")
    assert float(step.loss(collate(ROWS), 6).detach()) == pytest.approx(chunked, rel=1e-5)


def test_adapter_weights_are_float32_over_a_bf16_base(tiny_model: Path) -> None:
    model = attach_adapter(load(tiny_model).to(torch.bfloat16), METHODS["lora"], Lora(r=4))
    step = TrainingStep(model, TRAIN)
    step.update([collate(ROWS)])
    assert {parameter.dtype for parameter in step.trainable()} == {torch.float32}
    states = step.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_the_tracker_counts_what_is_alive() -> None:
    tracker = MemoryTracker()
    with tracker:
        a = torch.zeros(1000)  # 4000 bytes: 8 blocks
        b = a.view(10, 100)  # the same storage
        with part("head"):
            c = a + 1
        assert tracker.live_bytes == 2 * 4096
        del a, b
        assert tracker.live_bytes == 4096
    assert tracker.peak == {"activations": 4096, "head": 4096}
    assert c.sum() == 1000


@pytest.mark.parametrize("most", [1, 100, 682, 683, 1400, 8192])
def test_no_rows_have_larger_chunks_than_whole_ones(most: int) -> None:
    vocabulary = 49_152
    largest = chunk_rows(rows_of_whole_chunks(most, vocabulary), vocabulary)
    assert max(chunk_rows(rows, vocabulary) for rows in range(1, most + 1)) == largest


def test_the_head_takes_no_adapter() -> None:
    lora = Lora(r=4, alpha=8, target_modules=["q_proj", "lm_head"])
    recipe = Recipe(model="none", method="lora", dataset=Dataset(source="none"), lora=lora)
    with pytest.raises(RecipeError, match="the head cannot have an adapter") as caught:
        random_model(recipe, CONFIG, "cpu", torch.float32)
    assert caught.value.fix == "leave lm_head out, or lora.target_modules: all-linear"


def test_only_attention_that_knows_learned_sinks_is_taken() -> None:
    config = AutoConfig.for_model("gpt_oss", **VARIANTS, num_local_experts=4, head_dim=32)
    heads = architecture_of(config).heads
    assert heads.sinks
    assert "sdpa" not in [one.name for one in known_backends(heads, "cpu", packing=False)]
    assert known_backends(heads, "cuda")[0].name == "varlen"
    assert cannot(BACKENDS["sdpa"], heads, "cpu") == "leaves out learned sinks"
