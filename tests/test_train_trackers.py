"""Losses to other programs: read back from what they wrote, refused early, and harmless."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import WriteRecipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import trained

from strixft.catalog.trackers import TRACKERS, require_trackers
from strixft.plan.result import plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.open import open_run
from strixft.support.errors import HostError, RecipeError, Stopped
from strixft.train.loop import TrainingLoop
from strixft.train.stage import Trained, train_recipe
from strixft.train.trackers import CSV, FOLDER

BOTH = {"report_to": ["tensorboard", "csv"], "held_out_every": 3, "tokens_per_update": 60}


def table(path: Path, name: str) -> dict[int, float]:
    """A column of the table: update → number; no update may come twice."""
    with (path / CSV).open(newline="") as file:
        found = [
            (int(row["update"]), float(row[name])) for row in csv.DictReader(file) if row[name]
        ]
    assert len(dict(found)) == len(found)
    return dict(found)


def events(path: Path, name: str) -> dict[int, float]:
    read = EventAccumulator(str(path / FOLDER / "tensorboard")).Reload()
    return {one.step: one.value for one in read.Scalars(name)}


def test_they_have_the_losses_of_the_run_even_if_it_was_stopped(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    run, folder = open_run(write_recipe(train=BOTH), tmp_path / "run"), tmp_path / "run" / "train"
    prepare_recipe(run)
    plan_recipe(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "save", lambda loop: None)  # as if it was killed
        patch.setattr("strixft.guard.stage_watches.Watches.is_asked", lambda _: after(4, folder))
        with pytest.raises(Stopped):
            train_recipe(run)
    assert set(table(folder, "loss")) == {1, 2, 3, 4}
    train_recipe(run)
    figures = run.require(Trained).figures
    losses = dict(enumerate(figures["losses"], start=1))
    held_out = {one["update"]: one["held_out_loss"] for one in figures["held_out"]["evaluations"]}
    assert table(folder, "loss") == losses
    assert table(folder, "held_out_loss") == held_out
    assert events(folder, "loss") == pytest.approx(losses, rel=1e-6)
    assert events(folder, "held_out_loss") == pytest.approx(held_out, rel=1e-6)
    assert not figures["warnings"]


def after(update: int, folder: Path) -> bool:
    """Whether the table has this update's loss."""
    return (folder / CSV).is_file() and update in table(folder, "loss")


def test_one_that_fails_is_told_once_and_ends_nothing(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    run = open_run(write_recipe(train=BOTH), tmp_path / "run")
    _, result = trained(run)
    told = [text for text in result.figures["warnings"] if "tensorboard" in text]
    assert told == ["tensorboard gets no more losses: ConnectionError: nobody there"]
    assert len(table(tmp_path / "run" / "train", "loss")) == result.figures["updates"]


def test_a_missing_one_is_named_before_training(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostError, match="names mlflow, which is not installed") as caught:
        require_trackers(["csv", "mlflow"], offline=False)
    assert caught.value.fix == "pip install mlflow"


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "https://example.org"),
        ("wandb", "WANDB_MODE", ""),
        ("trackio", "TRACKIO_SPACE_ID", "me/space"),
    ],
)
def test_offline_refuses_those_that_would_send(
    name: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=f"offline is true, and train.report_to: {name}"):
        require_trackers([name], offline=True)
    require_trackers([name], offline=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/x")
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    require_trackers(TRACKERS, offline=True)


def test_an_unknown_one_names_the_nearest(write_recipe: WriteRecipe) -> None:
    with pytest.raises(RecipeError, match="no tracker 'tensorbord'") as caught:
        load_recipe(write_recipe(train={"report_to": ["tensorbord"]}))
    assert "did you mean 'tensorboard'?" in str(caught.value)
