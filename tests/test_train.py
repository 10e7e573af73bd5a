"""Training: the loop around the step, measured, resumed, and stopped before harm."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, WriteRecipe, chat, chats
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoTokenizer

import strixft
from strixft.app.cli import app
from strixft.data.batches import Batch, collate, largest_batch, rows_of_epochs, training_order
from strixft.model.source import model_source
from strixft.plan.result import Plan, plan_recipe
from strixft.prepare.stage import Prepared, prepare_recipe
from strixft.recipe.schema import Train
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.step.update import TrainingStep, batch_loss
from strixft.support.errors import FitError, StageError
from strixft.train.coverage import UPDATES
from strixft.train.loop import STATE, rate_factor
from strixft.train.stage import ADAPTER, CHECKPOINTS, Trained, train_recipe

ALONE = {"packing": False}
"""One chat a row, so that a test knows which."""


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
    rows = [chat(f"Name number {n}.", f"It is {n}.") for n in range(10, 82)]
    losses = []
    for count in (1, 4):
        train = {"micro_batch": count, "tokens_per_update": 56}  # two chats of 7 in a packed row
        path = write_recipe(rows=rows, train=train, dataset={"max_length": 96})
        run = open_run(path, tmp_path / f"rows-{count}")
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


def test_a_model_with_dropout_trains_as_one_without(
    write_recipe: WriteRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    runs = [
        open_run(write_recipe(name, model=str(model)), tmp_path / f"run-{name}")
        for name, model in (("with", folder), ("without", tiny_model))
    ]
    found, expected = (trained(run)[1].figures for run in runs)
    assert found["losses"] == expected["losses"]
    assert "training leaves out the dropout of 0.1 that the model has" in found["warnings"]
    assert not any("dropout" in warning for warning in expected["warnings"])


def test_no_module_is_walked_after_the_updates_that_prove(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_recipe(tiny_run), plan_recipe(tiny_run)
    walked = {"train": 0, "named_modules": 0}
    for name in walked:
        monkeypatch.setattr(nn.Module, name, counted(walked, name, getattr(nn.Module, name)))
    seen = []

    def loss(self: TrainingStep, batch: Batch, num_trained: int | Tensor) -> Tensor:
        seen.append(dict(walked))
        return batch_loss(self.model, batch, num_trained, self.options)

    monkeypatch.setattr(TrainingStep, "loss", loss)
    updates = train_recipe(tiny_run).figures["updates"]
    assert len(seen) >= updates > UPDATES + 1
    assert walked["train"] > 0 < walked["named_modules"]
    assert seen[-1] == seen[len(seen) * UPDATES // updates]


def test_the_next_updates_batches_are_made_before_an_update(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_recipe(tiny_run)
    plan = plan_recipe(tiny_run).figures
    steps, updates = plan["choice"]["gradient_accumulation_steps"], plan["updates"]
    made = {"collate": 0}
    monkeypatch.setattr("strixft.train.batches.collate", counted(made, "collate", collate))
    seen = []
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append(made["collate"]))
    train_recipe(tiny_run)
    hook.remove()
    proof = steps  # the first update's micro-batches, of which the first loss is proven
    assert seen == [proof + min(done + 2, updates) * steps for done in range(updates)]


def test_the_walk_to_backward_is_the_one_that_is_written_down(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, package = write_recipe(), Path(strixft.__file__).parent
    run, walked = open_run(recipe, tmp_path / "run"), list[str]()
    prepare_recipe(run), plan_recipe(run)

    def backward(_: Tensor) -> None:
        frames = traceback.extract_stack()
        walked.extend(f.name for f in frames if Path(f.filename).is_relative_to(package))
        raise InterruptedError

    monkeypatch.setattr(Tensor, "backward", backward)
    with pytest.raises(InterruptedError):
        app(["train", str(recipe), "--run-dir", str(run.folder)], standalone_mode=False)
    guide = (package.parent / "CONTRIBUTING.md").read_text()
    written = guide.partition("**From `strixft train` to `backward`**")[2].partition("\n\n")[0]
    assert walked == re.findall(r"`([a-z_]+)`", written)
    assert len(walked) <= 8


def test_weights_that_are_downloaded_first_are_inputs_of_every_checkpoint(
    tiny_model: Path, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "on-the-hub"
    run = open_run(write_recipe(model=str(folder), train=LONG, dataset=ALONE), tmp_path / "run")
    prepare_recipe(run), plan_recipe(run)
    (folder / "model.safetensors").rename(away)
    monkeypatch.setattr(
        "strixft.train.stage.fetch_base", lambda _: away.rename(folder / "model.safetensors")
    )
    train_recipe(run)
    inputs = json.loads((last_checkpoint(run) / "manifest.json").read_text())["inputs"]
    assert "model.safetensors" in inputs["base"]


def counted(calls: dict[str, int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, and its calls counted."""

    def counting(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*args, **options)

    return counting


def test_training_order_is_whole_passes_with_the_longest_row_first() -> None:
    lengths = [3, 9, 4, 5]
    order = training_order(lengths, 10, seed=0)
    assert order[0] == 1
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert order == training_order(lengths, 10, seed=0)
    assert order != training_order(lengths, 10, seed=1)


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=60),
    st.sampled_from([0.4, 1, 2, 2.5]),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_every_row_is_trained_once_an_epoch(
    lengths: list[int], epochs: float, rows: int, seed: int
) -> None:
    num_rows = rows_of_epochs(len(lengths), epochs)
    order = training_order(lengths, num_rows, seed, rows, padded=True)
    assert len(order) == max(1, round(len(lengths) * epochs))
    for first in range(0, len(order), len(lengths)):
        passed = order[first : first + len(lengths)]
        assert len(set(passed)) == len(passed)
    if epochs >= 1:
        assert max(lengths) in [lengths[row] for row in order[:rows]]


def test_padded_micro_batches_have_rows_of_similar_length() -> None:
    lengths = random.Random(0).choices(range(1, 500), k=300)

    def padding(order: list[int]) -> int:
        batches = [order[start : start + 4] for start in range(0, len(order), 4)]
        return sum(4 * max(lengths[n] for n in b) - sum(lengths[n] for n in b) for b in batches)

    grouped = training_order(lengths, 600, 1, 4, padded=True)
    assert padding(grouped) < 0.2 * padding(training_order(lengths, 600, 1))


def test_a_run_trains_every_token_of_every_row_in_each_epoch(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    settings = {"epochs": 3, "tokens_per_update": 170, "micro_batch": 4}
    for dataset in ({"max_length": 128}, ALONE):
        path = write_recipe(rows=chats(23), train=settings, dataset=dataset)
        run = open_run(path, tmp_path / f"run-{len(dataset)}-{dataset.get('packing')}")
        plan, result = trained(run)
        rows = run.require(Prepared).token_rows(run.recipe.dataset).train
        assert result.figures["tokens"] == 3 * sum(rows["length"])
        count = 3 * len(rows) if not plan.figures["choice"]["packed"] else None
        per_update = 4 * plan.figures["choice"]["gradient_accumulation_steps"]
        assert count is None or count % per_update
        assert count is None or result.figures["updates"] == -(-count // per_update)


def test_a_run_of_one_update_learns(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    train = {"tokens_per_update": 100_000, "warmup_fraction": 0.5}
    run = open_run(write_recipe(train=train), tmp_path / "run")
    _, result = trained(run)
    assert result.figures["updates"] == 1
    changed = load_file(run.folder / "train" / ADAPTER / "adapter_model.safetensors")
    assert all(float(w.abs().max()) > 0 for name, w in changed.items() if "lora_B" in name)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("updates", [1, 2, 3, 50])
def test_every_update_learns_and_one_at_the_full_rate(
    schedule: str, warmup: float, updates: int
) -> None:
    train = Train.model_validate({"schedule": schedule, "warmup_fraction": warmup})
    rates = [rate_factor(train, updates)(update) for update in range(updates)]
    assert max(rates) == 1
    assert min(rates) > 0
    peak = rates.index(1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_largest_batch_is_found_in_the_order_of_training() -> None:
    lengths, trained = [3, 9, 4, 5], [1, 2, 4, 3]
    assert largest_batch(lengths, trained, [1, 0, 2, 3], 2) == (9, 7)
    assert largest_batch(lengths, trained, [2, 0], 2) == (4, 5)


def test_training_without_a_plan_names_the_command(tiny_run: Run) -> None:
    with pytest.raises(StageError, match=r"stage prepare of .* has not run yet") as caught:
        train_recipe(tiny_run)
    assert caught.value.fix.startswith("strixft run ")
    assert caught.value.fix.endswith("--to prepare")


def poisoned(row: str) -> Callable[[TrainingStep, Batch, int | Tensor], Tensor]:
    """A loss that is no number where a batch holds a text's first trained token."""
    tokenizer = AutoTokenizer.from_pretrained(model_source(EMBEDDED))
    token = tokenizer(row)["input_ids"][0]

    def loss(self: TrainingStep, batch: Batch, num_trained: int | Tensor) -> Tensor:
        found = batch_loss(self.model, batch, num_trained)
        return found * float("nan") if (batch["input_ids"] == token).any() else found

    return loss


def last_checkpoint(run: Run) -> Path:
    folders = (run.folder / "train" / CHECKPOINTS).glob("checkpoint-*")
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    rows = [*chats(19), chat("Say it.", "zebra")]
    recipe = write_recipe(
        rows=rows,
        dataset={"validation_fraction": 0, **ALONE},
        train={"tokens_per_update": 60, "epochs": 2},
    )
    undisturbed, run = (open_run(recipe, tmp_path / name) for name in ("whole", "run"))
    losses = trained(undisturbed)[1].figures["losses"]
    prepare_recipe(run), plan_recipe(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "loss", poisoned("zebra"))
        with pytest.raises(StageError, match=r"the loss of update \d+ is nan; ") as caught:
            train_recipe(run)
    update = int(str(caught.value).split("update ")[1].split()[0])
    named = caught.value.problem.rpartition("tiny.jsonl, row ")[2].split(", ")
    assert str(len(rows)) in named
    assert run.status()["state"] == "failed"
    assert update > 1
    assert f"is nan; update {update - 1} is saved" in caught.value.problem
    assert f"--set train.learning_rate={2e-4:g}" in caught.value.fix
    assert last_checkpoint(run).name == f"checkpoint-{update - 1}"
    again = train_recipe(run)
    assert again.figures["first_update"] == update
    assert again.figures["losses"] == losses
    assert weights(run) == weights(undisturbed)


def weights(run: Run) -> bytes:
    """The trained weights, byte by byte."""
    return (run.folder / "train" / ADAPTER / "adapter_model.safetensors").read_bytes()


def test_a_gradient_that_is_no_number_names_every_row_of_the_update(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run = open_run(write_recipe(train={"micro_batch": 1}, dataset=ALONE), tmp_path / "run")
    prepare_recipe(run)
    choice = plan_recipe(run).figures["choice"]

    def endless(self: TrainingStep, batch: Batch, num_trained: int | Tensor) -> Tensor:
        loss = batch_loss(self.model, batch, num_trained)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "loss", endless)
        with pytest.raises(StageError, match="the gradient of update 1 is not a finite") as caught:
            train_recipe(run)
    rows = caught.value.problem.rpartition("row ")[2].split(", ")
    assert len(rows) == choice["gradient_accumulation_steps"] > 1
    assert "another base: no weight had been changed yet" in caught.value.fix
    assert "; none was finished before" in caught.value.problem


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("HIP out of memory"), RuntimeError("HIP error: out of memory")]
)
def test_memory_that_is_used_up_loses_no_finished_update(
    write_recipe: WriteRecipe, tmp_path: Path, error: Exception
) -> None:
    train = {"micro_batch": 2, "save_every_minutes": 0.001}
    recipe = write_recipe(train=train, dataset=ALONE)
    undisturbed, run = (open_run(recipe, tmp_path / name) for name in ("whole", "run"))
    trained(undisturbed)
    prepare_recipe(run)
    steps = plan_recipe(run).figures["choice"]["gradient_accumulation_steps"]
    calls = iter(range(1000))

    def full(self: TrainingStep, batch: Batch, num_trained: int | Tensor) -> Tensor:
        if next(calls) == 2 * steps:
            raise error
        return batch_loss(self.model, batch, num_trained)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "loss", full)
        with pytest.raises(FitError, match="no memory is left; update 2 is saved; the plan"):
            train_recipe(run)
    assert last_checkpoint(run).name == "checkpoint-2"
    assert run.status()["fix"].count("--set ") == 2
    train_recipe(run)
    assert_equal_bit_for_bit(run, undisturbed)


def test_jumps_of_the_loss_and_warnings_are_shown(tiny_run: Run) -> None:
    figures = trained(tiny_run)[1].figures | {
        "spikes": [2],
        "warnings": ["the host has <2 GiB> left"],
        "checkpoints_set_aside": ["checkpoint-2.torn: manifest.json is missing"],
    }
    html = replace(tiny_run.require(Trained), figures=figures)._repr_html_()
    assert "The loss jumped at these updates, marked below: 2." in html
    assert "the host has &lt;2 GiB&gt; left" in html
    assert "Torn, so set aside: checkpoint-2.torn: manifest.json is missing." in html


TRAIN = """
import sys
from strixft import open_run
from strixft import prepare_recipe
from strixft import plan_recipe
from strixft import train_recipe
run = open_run(sys.argv[1], sys.argv[2])
prepare_recipe(run), plan_recipe(run)
print("planned", flush=True)
train_recipe(run)
"""
LONG = {"epochs": 2, "tokens_per_update": 100, "micro_batch": 1, "save_every_minutes": 0.001}


def start(recipe: Path, folder: Path) -> subprocess.Popen[str]:
    """Train in a process of its own; returns when it does."""
    command = [sys.executable, "-c", TRAIN, str(recipe), str(folder)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout
    assert child.stdout.readline() == "planned\n"
    deadline = time.monotonic() + 120
    while not list(folder.glob("train/checkpoints/checkpoint-*")):
        assert child.poll() is None, "the child ended before it could be disturbed"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    return child


@pytest.fixture(scope="module")
def long_run(
    tmp_path_factory: pytest.TempPathFactory, write_module_recipe: WriteRecipe
) -> tuple[Path, Run]:
    """A recipe, and a run of it that nothing disturbed."""
    recipe = write_module_recipe(rows=chats(40), train=LONG, dataset=ALONE)
    run = open_run(recipe, tmp_path_factory.mktemp("runs") / "whole")
    trained(run)
    return recipe, run


def end_and_finish(recipe: Path, folder: Path, number: signal.Signals) -> tuple[Run, str]:
    """A run that a signal ends, and that goes on; and what was written to standard error."""
    child = start(recipe, folder)
    child.send_signal(number)
    _, errors = child.communicate()
    run = open_run(recipe, folder)
    status = run.status()
    assert status["state"] == ("failed" if number is signal.SIGKILL else "stopped")
    if number is not signal.SIGKILL:
        assert f"received {number.name}, update " in status["problem"]
    trained(run)
    return run, errors


def assert_equal_bit_for_bit(run: Run, undisturbed: Run) -> None:
    """A run that went on is what it would have been."""
    found, expected = (one.require(Trained).figures for one in (run, undisturbed))
    assert found["first_update"] > 1
    for figure in ("losses", "updates", "tokens"):
        assert found[figure] == expected[figure]
    assert weights(run) == weights(undisturbed)
    mine, whole = last_checkpoint(run), last_checkpoint(undisturbed)
    if mine.name == whole.name:
        assert same(*(torch.load(folder / STATE, weights_only=True) for folder in (mine, whole)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_was_ended_goes_on_bit_for_bit(
    long_run: tuple[Path, Run], tmp_path: Path, number: signal.Signals
) -> None:
    recipe, undisturbed = long_run
    run, errors = end_and_finish(recipe, tmp_path / "run", number)
    assert ("Stopped" in errors) == (number is not signal.SIGKILL)
    assert_equal_bit_for_bit(run, undisturbed)


def test_settings_of_later_stages_may_change_before_training_goes_on(
    long_run: tuple[Path, Run], tmp_path: Path
) -> None:
    recipe, undisturbed = long_run
    child = start(recipe, tmp_path / "run")
    child.send_signal(signal.SIGTERM)
    child.communicate()
    later = {"evaluate.max_rows": 3, "export.to": ["merged"], "offline": True}
    run = open_run(recipe, tmp_path / "run", later)
    train_recipe(run)
    assert_equal_bit_for_bit(run, undisturbed)


def test_packed_rows_go_on_bit_for_bit(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    train = {**LONG, "epochs": 6, "tokens_per_update": 200}
    recipe = write_recipe(rows=chats(40), train=train, dataset={"max_length": 128})
    undisturbed = open_run(recipe, tmp_path / "whole")
    plan, _ = trained(undisturbed)
    assert plan.figures["choice"]["packed"]
    run, _ = end_and_finish(recipe, tmp_path / "run", signal.SIGKILL)
    assert_equal_bit_for_bit(run, undisturbed)


def same(one: Any, other: Any) -> bool:
    """Equal, down to the last bit of every tensor."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((one == other).all())
    return bool(one == other)
