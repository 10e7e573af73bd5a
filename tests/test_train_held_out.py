"""Held-out losses while training: right, free of consequences, cheap; best weights; early stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe, chats
from peft import PeftModel
from safetensors.torch import load_file
from test_train import ALONE, LONG, assert_equal_bit_for_bit, end_and_finish, trained, weights
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from strixft.data.batches import PackedShape, RowShape
from strixft.data.held_out import micro_batches
from strixft.plan.dry_run import DryRun
from strixft.plan.held_out import SHARE, held_out_figures
from strixft.plan.result import Plan, plan_recipe
from strixft.plan.show import summary
from strixft.prepare.stage import Prepared, prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import RecipeError
from strixft.train.held_out import BEST, LOSSES
from strixft.train.stage import ADAPTER, Trained

WILD = {"learning_rate": 0.4, "schedule": "constant"}
"""Learns so fast that held-out losses rise."""

OFTEN = {**LONG, "epochs": 1, "held_out_every": 5} | WILD


def own_loss(run: Run, folder: str) -> float:
    """The mean held-out loss of an adapter by plain transformers and PEFT, row by row."""
    base = AutoModelForCausalLM.from_pretrained(run.recipe.model)
    model = PeftModel.from_pretrained(base, run.folder / "train" / folder).eval()
    losses = []
    for row in run.require(Prepared).token_rows(run.recipe.dataset).validation:
        ids, trained_tokens = torch.tensor([row["input_ids"]]), torch.tensor(row["trained"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        each = cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(each[trained_tokens[1:]])
    return float(torch.cat(losses).mean())


@pytest.fixture(scope="module", params=["packed", "alone"])
def run_of_best(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_module_recipe: WriteRecipe,
) -> Run:
    """A run that is evaluated often, packed or not."""
    dataset: dict[str, Any] = ALONE if request.param == "alone" else {"max_length": 128}
    train = {**OFTEN, "epochs": 2, "micro_batch": 2, "tokens_per_update": 1}
    recipe = write_module_recipe(request.param, chats(40), train=train, dataset=dataset)
    run = open_run(recipe, tmp_path_factory.mktemp("runs") / request.param)
    trained(run)
    return run


def test_the_losses_are_those_of_plain_transformers(run_of_best: Run) -> None:
    figures, planned = run_of_best.require(Trained).figures, run_of_best.require(Plan).figures
    assert bool(planned["choice"]["packed"]) == ("packed" in run_of_best.folder.name)
    rows = run_of_best.require(Prepared).figures["rows_validation"]
    assert planned["held_out"]["of"] == rows
    found = figures["held_out"]["evaluations"]
    assert [one["update"] for one in found] == [
        *range(0, figures["updates"], 5),
        figures["updates"],
    ]
    assert planned["held_out"]["rows"] == rows
    assert found[-1]["held_out_loss"] == pytest.approx(own_loss(run_of_best, ADAPTER), rel=1e-5)
    best = figures["held_out"]["best"]["held_out_loss"]
    assert best == pytest.approx(own_loss(run_of_best, BEST), rel=1e-5)


def test_the_best_weights_stay_beside_the_last(run_of_best: Run) -> None:
    told = run_of_best.require(Trained).figures["held_out"]
    lowest = min(told["evaluations"][1:], key=lambda one: one["held_out_loss"])
    assert told["best"] == lowest
    assert told["kept"] == "last"
    folder = run_of_best.folder / "train" / BEST
    assert json.loads((folder / LOSSES).read_text()) == lowest
    last = load_file(run_of_best.folder / "train" / ADAPTER / "adapter_model.safetensors")
    best = load_file(folder / "adapter_model.safetensors")
    is_last = lowest["update"] == told["evaluations"][-1]["update"]
    assert all(torch.equal(best[name], last[name]) for name in last) == is_last


def test_training_is_the_same_without_them(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With dropout, which draws from torch's generator in every forward pass."""
    runs = []
    for every in (0, 3):
        train = {**OFTEN, "held_out_every": every}
        recipe = write_recipe(f"every-{every}", train=train, lora={"dropout": 0.2})
        runs.append(open_run(recipe, tmp_path / f"run-{every}"))
        trained(runs[-1])
    without, often = (run.require(Trained).figures for run in runs)
    assert without["held_out"]["evaluations"] == []
    assert len(often["held_out"]["evaluations"]) > 2
    assert often["losses"] == without["losses"]
    assert often["peak_bytes"] == without["peak_bytes"]
    assert often["planned_peak_bytes"] == without["planned_peak_bytes"]
    assert weights(runs[1]) == weights(runs[0])


def test_a_killed_run_has_the_same_losses_and_end(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """huggingface/transformers#28544 and #39560, unslothai/unsloth-zoo#822.

    Evaluations before the kill count for the early stop, and the best weights of then stay.
    """
    train = {**LONG, "held_out_every": 2, "early_stop": 3, "keep": "best"} | WILD
    recipe = write_recipe(rows=chats(40), train=train, lora={"dropout": 0.1}, dataset=ALONE)
    undisturbed = open_run(recipe, tmp_path / "whole")
    trained(undisturbed)
    run, _ = end_and_finish(recipe, tmp_path / "run", signal.SIGKILL)
    assert_equal_bit_for_bit(run, undisturbed)
    found, expected = (one.require(Trained).figures for one in (run, undisturbed))
    assert found["held_out"] == expected["held_out"]
    assert "evaluations since brought no lower one" in found["held_out"]["stopped_early"]
    assert found["updates"] < run.require(Plan).figures["updates"]
    assert run.status()["state"] == "done"
    best = (run.folder / "train" / BEST / "adapter_model.safetensors").read_bytes()
    assert weights(run) == best
    assert found["held_out"]["kept"] == "best"


def test_a_plan_keeps_the_cost_small(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    train = {"tokens_per_update": 30, "epochs": 60, "micro_batch": 1}
    run = open_run(write_recipe(rows=chats(60), train=train), tmp_path / "run")
    prepare_recipe(run)
    planned = plan_recipe(run).figures
    assert planned["held_out"]["every"] > 0
    assert 0 < planned["held_out"]["fraction"] <= SHARE
    assert f"every {planned['held_out']['every']} updates" in summary(planned)["held-out loss"]


def a_run_of(steps: int, update_s: float | None = 1.0) -> DryRun:
    return DryRun(
        shape=RowShape(2, 256, 512),
        recomputed_layers=0,
        num_layers=2,
        parts={"adapter": 10**6},
        unsplit_bytes=0,
        resident_bytes=0,
        reserved_bytes=0,
        steps=steps,
        seconds_per_update=update_s,
        forward_seconds=update_s and update_s / steps / 3,
    )


@pytest.mark.parametrize("update_s", [0.01, 600.0, None])
@pytest.mark.parametrize("steps", [1, 64])
@pytest.mark.parametrize("updates", [3, 200, 100_000])
def test_auto_never_takes_more_than_its_share(
    tiny_run: Run, updates: int, steps: int, update_s: float | None
) -> None:

    prepared = prepare_recipe(tiny_run)
    found = held_out_figures(tiny_run.recipe, a_run_of(steps, update_s), updates, prepared)
    assert found is not None
    if found["every"]:
        assert found["fraction"] <= SHARE
        assert 3 <= found["evaluations"] <= 52
    else:
        assert "more than 2% of the time" in found["reason"]


def test_micro_batches_are_no_larger_than_those_of_training() -> None:
    lengths = [5, 40, 8, 20, 3, 31, 12, 9, 64, 1, 7, 30] * 5
    counts = [n // 2 for n in lengths]
    packed = PackedShape(length=48, documents=14, longest=32, rows=3)
    found = micro_batches(lengths, counts, RowShape(3, 48, 40, packed))
    used = [document for batch in found for row in batch for document in row]
    assert len(used) == len(set(used))
    assert {lengths[document] for document in range(len(lengths))} - {
        lengths[document] for document in used
    } == {40, 64}  # longer than any document or row
    for batch in found:
        assert len(batch) <= 3
        assert all(sum(lengths[document] for document in row) <= 48 for row in batch)
        assert sum(counts[document] for row in batch for document in row) <= 40


def test_what_needs_the_loss_is_refused_without_it(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="need the held-out loss, and held_out_every is 0"):
        load_recipe(write_recipe(train={"held_out_every": 0, "keep": "best"}))
    none = {"dataset": {"validation_fraction": 0}, "train": {"early_stop": 2}}

    run = open_run(write_recipe(**none), tmp_path / "run")
    prepare_recipe(run)
    with pytest.raises(RecipeError, match="no rows are held out") as caught:
        plan_recipe(run)
    assert caught.value.settings == {"train.early_stop": 0, "train.keep": "last"}
