"""Evaluation: loss and answers of base and tuned on the held-out rows."""

import math
from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe
from test_train import trained

from strixft.errors import DataError
from strixft.evaluate import answer, evaluate_recipe
from strixft.model import load_base, load_tokenizer
from strixft.runs import Run, open_run


def test_base_and_tuned_are_measured_on_the_same_rows(tiny_run: Run) -> None:
    trained(tiny_run)
    figures = evaluate_recipe(tiny_run).figures
    loss = figures["metrics"]["loss"]
    assert loss["tuned"] < loss["base"]
    assert figures["metrics"]["perplexity"]["base"] == pytest.approx(math.exp(loss["base"]))
    assert figures["metrics"]["exact_match"].keys() == {"base", "tuned"}
    assert figures["rows_answered"] == len(figures["answers"]) > 0


def test_full_training_is_evaluated_from_its_own_weights(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = open_run(write_recipe(method="full"), tmp_path / "run")
    trained(run)
    loss = evaluate_recipe(run).figures["metrics"]["loss"]
    assert loss["tuned"] < loss["base"]


def test_answers_in_a_batch_are_the_answers_alone(tiny_run: Run) -> None:
    model = load_base(tiny_run.recipe, "cpu", torch.float32).eval()
    tokenizer = load_tokenizer(tiny_run.recipe)
    prompts = [tokenizer(text)["input_ids"] for text in ("One.", "A much longer prompt than that.")]
    together = answer(model, tokenizer, prompts, 8)
    assert together == [answer(model, tokenizer, [prompt], 8)[0] for prompt in prompts]


def test_nothing_held_out_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(dataset={"validation_fraction": 0}), tmp_path / "run")
    trained(run)
    with pytest.raises(DataError, match="no rows are held out") as caught:
        evaluate_recipe(run)
    assert "dataset.validation_fraction" in caught.value.fix
