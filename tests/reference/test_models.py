"""First loss and gradients of each model type against transformers and PEFT, row by row.

Ours: rows packed as they are trained. Theirs: eager attention, each document by itself, the
adapter that we have written loaded by PEFT alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHIPPED, TINY, VOCABULARY, write_model
from torch import Tensor, nn

from strixft.catalog.hosts import Host
from strixft.data.batches import Batch, RowShape, collate
from strixft.guard.host import find_host
from strixft.model.adapter import base_of
from strixft.model.architecture import auto_class, text_decoder
from strixft.model.load import build
from strixft.model.source import load_config
from strixft.plan.dry_run import dry_run
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Lora, Recipe, Train
from strixft.step.memory_tracker import MemoryTracker
from strixft.step.update import TrainingStep
from strixft.train import coverage

LENGTHS = ((19, 30, 4), (26, 11))
"""Tokens of the documents of two rows."""


def documents() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        [torch.randint(6, VOCABULARY, (length,), generator=draw) for length in row]
        for row in LENGTHS
    ]


def trained_in(document: Tensor) -> Tensor:
    """The second half of a document."""
    return torch.arange(len(document)) >= len(document) // 2


def a_batch(packed: bool) -> Batch:
    rows = documents() if packed else [[one] for row in documents() for one in row]
    return collate(
        [
            {
                "input_ids": torch.cat(row).numpy(),
                "trained": torch.cat(list(map(trained_in, row))).numpy(),
                **({"lengths": list(map(len, row))} if packed else {}),
            }
            for row in rows
        ]
    )


def a_recipe(folder: Path) -> Recipe:
    return Recipe(
        model=str(folder),
        method="lora",
        dataset=Dataset(source="none", max_length=64),
        lora=Lora(r=3, alpha=6),
        train=Train(compile="none"),
        offline=True,
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def theirs(folder: Path, adapter: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers and PEFT."""
    from peft import PeftModel

    auto = auto_class(load_config(a_recipe(folder)))
    base = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    count = sum(int(trained_in(one)[1:].sum()) for row in documents() for one in row)
    total = 0.0
    for one in (one for row in documents() for one in row):
        logits = model(input_ids=one[None], use_cache=False).logits[0].float()
        places = trained_in(one)[1:]
        loss = nn.functional.cross_entropy(logits[:-1][places], one[1:][places], reduction="sum")
        (loss / count).backward()
        total += float(loss.detach()) / count
    return total, gradients(model)


def cpu() -> Host:
    return find_host("cpu")


MODELS_TRIED = TINY | SHIPPED


@pytest.mark.parametrize("name", MODELS_TRIED)
def test_first_loss_and_gradients_are_those_of_transformers_and_peft(
    name: str, tmp_path: Path
) -> None:
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    write_model(folder, MODELS_TRIED[name])
    recipe = a_recipe(folder)
    job = Job.of(recipe, load_config(recipe), cpu())
    options, carries_state = job.options, job.architecture.heads.carries_state
    assert (options.backend.packed, dict(job.proof.leaks)) == (not carries_state, {})
    torch.manual_seed(3)
    model: Any = build(recipe, "cpu", torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.1)  # at 0.2 float32 alone is up to 1 % off in a qwen3_next
    model.save_pretrained(adapter)
    batch = a_batch(options.backend.packed)
    check_planned_weights(recipe, model, batch)
    step = TrainingStep(model, recipe.train, options)
    loss = step.loss(batch, len(batch["labels"]))
    loss.backward()
    due, expected = theirs(folder, adapter)
    assert loss.item() == pytest.approx(due, rel=2e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert len(found) >= 6
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-4 * largest, key
    check_what_is_adapted(model)
    check_training_is_proven(step, batch)


def check_training_is_proven(step: TrainingStep, batch: Batch) -> None:
    """After two updates each trained tensor has learned, and what is trained is told."""
    told = coverage.describe(step.model)
    assert not told["layers_without"]
    proven: list[dict[str, Any]] = []
    watch = coverage.FirstUpdates(step, batch, proven.append)
    for _ in range(coverage.UPDATES):
        step.update([batch], before_step=lambda *_: watch.before_step())
        watch.after_step()
    assert proven[0]["moved"] == told["tensors"]
    assert proven[0]["adapter_changes"] > 0


def check_what_is_adapted(model: nn.Module) -> None:
    """Only layers of the text decoder, and no router."""
    decoder = {id(module) for module in text_decoder(base_of(model)).modules()}
    adapted = [n for n, m in model.named_modules() if n.endswith(".lora_A")]
    for name in adapted:
        layer = model.get_submodule(name.removesuffix(".lora_A"))
        assert id(layer) in decoder, name
        assert ".router" not in name
        assert not name.endswith(".gate.lora_A")


def check_planned_weights(recipe: Recipe, model: nn.Module, batch: Batch) -> None:
    """The plan counts the weights that were loaded, all layers of them."""
    rows, length = batch["input_ids"].shape
    shape = RowShape(rows, length, len(batch["labels"]))
    planned = dry_run(Job.of(recipe, load_config(recipe), cpu()), shape)
    tracker = MemoryTracker()
    tracker.watch_model(model)
    assert planned.parts["weights"] + planned.parts["adapter"] == tracker.live_bytes


def test_the_types_are_many() -> None:
    assert len({sides["model_type"] for sides in TINY.values()}) >= 40


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_saved_adapter_leaves_the_tower_of_the_whole_model_alone(
    name: str, tmp_path: Path
) -> None:
    """PEFT goes by the last parts of names, which a tower has too; Gemma 4's it refuses."""
    from peft import PeftModel

    write_model(tmp_path / "seeing", TINY[name])
    own: Any = build(a_recipe(tmp_path / "seeing"), "cpu", torch.float32)
    own.save_pretrained(tmp_path / "adapter")
    auto = auto_class(load_config(a_recipe(tmp_path / "seeing")))
    whole = auto.from_pretrained(tmp_path / "seeing")
    assert any("vision_tower" in key for key, _ in whole.named_parameters())
    beside = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    adapted = {key for key, _ in beside.named_parameters() if "lora_" in key}
    assert adapted == {key for key, _ in own.named_parameters() if "lora_" in key}
    assert all("language_model" in key for key in adapted)
