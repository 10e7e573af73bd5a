"""Evaluation: loss and answers of base and tuned on the held-out rows."""

import math
from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe
from test_train import trained

from strixft.errors import DataError
from strixft.evaluate import evaluate_recipe
from strixft.evaluate.generate import generate
from strixft.evaluate.metrics import scores, suiting
from strixft.evaluate.paired import paired_change
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
    assert figures["changes"]["loss"]["change"] == pytest.approx(loss["tuned"] - loss["base"])
    assert figures["changes"]["loss"]["low"] <= figures["changes"]["loss"]["high"]
    assert figures["rows_worse"] >= len(figures["worst"])
    assert all(row["tuned"] > row["base"] for row in figures["worst"])
    assert figures["speed"]["tuned"]["answer_tokens"] > 0


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
    together = generate(model, tokenizer, prompts, 8)
    assert together == [generate(model, tokenizer, [prompt], 8)[0] for prompt in prompts]


def test_nothing_held_out_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    run = open_run(write_recipe(dataset={"validation_fraction": 0}), tmp_path / "run")
    trained(run)
    with pytest.raises(DataError, match="no rows are held out") as caught:
        evaluate_recipe(run)
    assert "dataset.validation_fraction" in caught.value.fix


def test_a_paired_interval_sees_what_is_no_chance() -> None:
    base = [1.0, 2.0, 3.0, 4.0] * 5
    better = paired_change(base, [value - 0.5 for value in base])
    assert (better["low"], better["change"], better["high"]) == (-0.5, -0.5, -0.5)
    assert better["clear"]
    chance = paired_change([0.0] * 20, [0.1, -0.1] * 10)
    assert chance["low"] < 0 < chance["high"]
    assert not chance["clear"]


def test_weights_count_in_an_interval() -> None:
    assert paired_change([0, 0], [1, 0], [3, 1])["change"] == 0.75


def test_metrics_are_guessed_from_the_references() -> None:
    assert suiting(['{"a": 1}', "[2]"]) == ["exact_match", "json_valid", "json_equal"]
    assert suiting(["12", "so it is\n#### 7"]) == ["exact_match", "number"]
    assert suiting(["some words", "12"]) == ["exact_match"]


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("exact_match", " a ", "a", 1),
        ("json_valid", "{broken", "{}", 0),
        ("json_valid", '{"b": 1}', "{}", 1),
        ("json_equal", '{"b":1,"a":2}', '{"a": 2, "b": 1}', 1),
        ("json_equal", "word", "word", 0),
        ("number", "it costs 1,200.0 in all", "#### 1200", 1),
        ("number", "nothing", "nothing", 0),
        ("pattern", "id-7 found", "the id-7", 1),
        ("pattern", "id-8", "id-7", 0),
    ],
)
def test_scores(name: str, answer: str, reference: str, score: float) -> None:
    assert scores(name, [answer], [reference], r"id-\d") == [score]
