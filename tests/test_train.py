"""Training: TRL's loop around our step, measured, resumed, and stopped before harm."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import WriteRecipe, chat, chats
from torch import Tensor

from strixft.data import Batch, largest_batch, training_order
from strixft.errors import StageError
from strixft.plan import Plan, plan_recipe
from strixft.prepare import prepare_recipe
from strixft.runs import Run, open_run
from strixft.step import TrainingStep, batch_loss
from strixft.train import ADAPTER, Trained, train_recipe


def trained(run: Run) -> tuple[Plan, Trained]:
    prepare_recipe(run)
    return plan_recipe(run), train_recipe(run)


def test_a_run_learns_and_is_measured(tiny_run: Run) -> None:
    plan, result = trained(tiny_run)
    figures = result.figures
    assert figures["updates"] == plan.figures["updates"] == len(figures["losses"])
    assert figures["losses"][-1] < figures["losses"][0]
    assert figures["tok_per_s"] > 0
    assert (tiny_run.folder / "train" / ADAPTER / "adapter_model.safetensors").is_file()
    assert tiny_run.status()["state"] == "done"


def test_the_plan_is_what_training_needs(tiny_run: Run) -> None:
    plan, result = trained(tiny_run)
    assert result.figures["planned_peak_bytes"] == plan.figures["peak_bytes"]
    assert result.figures["peak_bytes"] == pytest.approx(plan.figures["peak_bytes"], rel=0.01)


def test_accumulated_micro_batches_train_as_one(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [
        chat(f"Name number {n}.", f"It is {n}.") for n in range(10, 34)
    ]  # 7 trained tokens each
    losses = []
    for count in (1, 4):
        train = {"micro_batch": count, "tokens_per_update": 28}
        run = open_run(write_recipe(rows=rows, train=train), tmp_path / f"rows-{count}")
        plan, result = trained(run)
        choice = plan.figures["choice"]
        assert choice["micro_batch_rows"] == count
        assert choice["micro_batch_rows"] * choice["gradient_accumulation_steps"] == 4
        losses.append(result.figures["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_same_seed_gives_the_same_losses(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    runs = [open_run(write_recipe(), tmp_path / name) for name in ("a", "b")]
    first, second = (trained(run)[1].figures["losses"] for run in runs)
    assert first == second


def test_training_order_is_whole_passes_with_the_longest_row_first() -> None:
    lengths = [3, 9, 4, 5]
    order = training_order(lengths, 10, seed=0)
    assert order[0] == 1
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert order == training_order(lengths, 10, seed=0)
    assert order != training_order(lengths, 10, seed=1)


def test_the_largest_batch_is_found_in_the_order_of_training() -> None:
    lengths, trained = [3, 9, 4, 5], [1, 2, 4, 3]
    assert largest_batch(lengths, trained, [1, 0, 2, 3], 2) == (9, 7)
    assert largest_batch(lengths, trained, [2, 0], 2) == (4, 5)


def test_training_without_a_plan_names_the_command(tiny_run: Run) -> None:
    with pytest.raises(StageError, match=r"stage prepare of .* has not run yet") as caught:
        train_recipe(tiny_run)
    assert caught.value.fix.startswith("strixft run ")
    assert caught.value.fix.endswith("--to prepare")


def test_a_loss_that_is_no_number_stops_the_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"learning_rate": 0.9, "max_grad_norm": 1e30, "epochs": 40})
    run = open_run(recipe, tmp_path / "run")
    prepare_recipe(run)
    plan_recipe(run)

    def broken(self: TrainingStep, batch: Batch, num_trained: int | Tensor) -> Tensor:
        return batch_loss(self.model, batch, num_trained) * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "loss", broken)
        with pytest.raises(StageError, match="the loss of update 1 is nan") as caught:
            train_recipe(run)
    assert "--set train.learning_rate=0.09" in caught.value.fix
    assert run.status()["state"] == "failed"
    assert not run.is_done("train")


KILLED = """
import sys
from strixft import open_run, prepare_recipe, plan_recipe, train_recipe
run = open_run(sys.argv[1], sys.argv[2])
prepare_recipe(run), plan_recipe(run), train_recipe(run)
"""


def test_a_killed_run_goes_on_from_its_checkpoint(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    train = {"epochs": 4, "tokens_per_update": 100, "save_every_minutes": 0.001}
    recipe = write_recipe(rows=chats(40), train=train)
    whole = trained(open_run(recipe, tmp_path / "whole"))[1].figures["losses"]
    folder = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", KILLED, recipe, folder])
    deadline = time.monotonic() + 120
    while not list(folder.glob("train/checkpoints/checkpoint-*/trainer_state.json")):
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    again = trained(open_run(recipe, folder))[1].figures
    assert again["updates"] == len(whole)
    assert again["losses"] == pytest.approx(whole, rel=1e-6)
    assert again["first_update"] > 1
