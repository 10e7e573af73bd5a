"""The proof of the first loss: right steps pass, and each way to be wrong is caught."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBEDDED, WriteRecipe, chats, recipe_writer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from strixft.attention import masks
from strixft.data.batches import Batch, collate
from strixft.model.architecture import Head
from strixft.model.source import model_source
from strixft.plan.result import plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import StageError
from strixft.train.proof import TOLERANCE
from strixft.train.stage import PROOF, train_recipe

WINDOW = 16
"""Tokens; shorter than the rows."""


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Gemma 3 of three layers, two of which look back 16 tokens."""
    folder = tmp_path_factory.mktemp("models") / "windowed"
    tokenizer = AutoTokenizer.from_pretrained(model_source(EMBEDDED))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def planned(windowed: Path, tmp_path: Path) -> Callable[[bool], Run]:
    """Plans a run whose first update has several documents in a micro-batch."""

    def plan(packing: bool) -> Run:
        dataset = {"packing": packing, "max_length": 128}
        train = {"micro_batch": 2, "tokens_per_update": 400}
        write: WriteRecipe = recipe_writer(tmp_path, windowed)
        run = open_run(write(rows=chats(24), dataset=dataset, train=train), tmp_path / "run")
        prepare_recipe(run)
        assert bool(plan_recipe(run).figures["choice"]["packed"]) == packing
        return run

    return plan


@pytest.mark.parametrize("packing", [True, False])
def test_a_right_step_passes_and_says_what_was_compared(
    planned: Callable[[bool], Run], packing: bool
) -> None:
    result = train_recipe(planned(packing))
    proof = result.figures["proof"]
    assert proof["difference"] < proof["tolerance"] == TOLERANCE[torch.float32]
    assert proof["documents"] > 1
    assert proof["tokens"] > 50
    assert proof["loss"] == pytest.approx(proof["own_loss"], abs=1e-5)
    assert "the model's own forward" in html.unescape(result._repr_html_())


Right = Callable[[Tensor, int | None], Tensor]
MASKS: dict[str, Callable[[Right, Tensor, int | None], Tensor]] = {
    "documents see each other": lambda right, documents, window: right(documents * 0, window),
    "the window is lost": lambda right, documents, window: right(documents, None),
    "the window is one too short": lambda right, documents, window: right(
        documents, window and window - 1
    ),
    "tokens see what follows": lambda right, documents, window: (
        right(documents, window) | right(documents, window).transpose(2, 3)
    ),
}


def refused(run: Run) -> StageError:
    with pytest.raises(StageError, match="the first loss is not the model's own") as caught:
        train_recipe(run)
    assert not (run.folder / "train" / PROOF).exists()
    assert not list(run.folder.glob("train/checkpoints/checkpoint-*"))
    return caught.value


@pytest.mark.parametrize("mutant", MASKS)
def test_a_wrong_mask_is_caught(
    planned: Callable[[bool], Run], mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, right = planned(True), masks.dense_mask

    def wrong(documents: Tensor, window: int | None = None) -> Tensor:
        return MASKS[mutant](right, documents, window)

    monkeypatch.setattr(masks, "dense_mask", wrong)
    error = refused(run)
    assert error.fix.startswith("--set dataset.packing=false")
    assert error.fix.endswith("--from plan")


@pytest.mark.parametrize("packing", [True, False])
def test_a_wrong_label_is_caught(
    planned: Callable[[bool], Run], packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(packing)

    def shifted(*args: Any) -> Batch:
        batch = collate(*args)
        batch["labels"] = batch["input_ids"].flatten()[batch["positions"]]
        return batch

    monkeypatch.setattr("strixft.train.batches.collate", shifted)
    refused(run)


def test_a_wrong_head_is_caught(
    planned: Callable[[bool], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(False)
    monkeypatch.setattr("strixft.step.update.linear_head", lambda base: Head(1.01, None))
    refused(run)
