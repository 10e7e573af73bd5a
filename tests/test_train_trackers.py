"""Losses to other programs: read back from what they wrote, refused early, and harmless."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import WriteRecipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import trained

from strixft.catalog.trackers import TRACKERS, require_trackers
from strixft.plan.result import plan_recipe
from strixft.prepare.stage import prepare_recipe
from strixft.recipe.load import load_recipe
from strixft.run.log import LOG, append
from strixft.run.open import open_run
from strixft.support.errors import HostError, RecipeError, Stopped
from strixft.train.loop import TrainingLoop
from strixft.train.stage import Trained, train_recipe
from strixft.train.trackers import CSV, FOLDER, Trackers

BOTH = {"trackers": ["tensorboard", "csv"], "held_out_every": 3, "tokens_per_update": 60}


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
    with pytest.raises(RecipeError, match=f"offline is true, and train.trackers: {name}"):
        require_trackers([name], offline=True)
    require_trackers([name], offline=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/x")
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    require_trackers(TRACKERS, offline=True)


def test_an_unknown_one_names_the_nearest(write_recipe: WriteRecipe) -> None:
    with pytest.raises(RecipeError, match="no tracker 'tensorbord'") as caught:
        load_recipe(write_recipe(train={"trackers": ["tensorbord"]}))
    assert "did you mean 'tensorboard'?" in str(caught.value)


def strict(line: str) -> dict[str, Any]:
    """A line as a strict reader of JSON takes it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


def test_an_update_that_float16_skipped_leaves_whole_json(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hustvl/MapTR#216, MakazhanAlpamys/Soup#546: a scale that is too high gives infinite norms."""
    run = open_run(write_recipe(train={**BOTH, "epochs": 4}), tmp_path / "run")
    prepare_recipe(run)
    plan_recipe(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda enabled: scaler)
    train_recipe(run)
    folder = run.stage_folder("train")
    records = [strict(line) for line in (folder / LOG).read_text().splitlines()]
    norms = [one["grad_norm"] for one in records if "grad_norm" in one]
    assert norms[0] is None
    assert norms[-1] > 0
    assert set(table(folder, "grad_norm")) == {n for n, one in enumerate(norms, start=1) if one}
    assert strict(json.dumps(run.observer().look().to_dict()))["last_update"]["grad_norm"] > 0


class Program(ModuleType):
    """What accelerate's trackers call of `wandb`, `trackio` and `mlflow`, which are not installed.

    It notes to which of its runs each update went.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seen: list[tuple[str, int]] = []
        self.config = self.info = self
        self.utils = self.validation = self
        self.MAX_PARAM_VAL_LENGTH, self.MAX_PARAMS_TAGS_PER_BATCH = 500, 100
        self.params: dict[str, Any] = {}

    def init(self, *, project: str, **given: Any) -> Program:
        assert given["resume"] == "allow"
        self.run_id = given.get("id") or given["name"]
        return self

    def start_run(self, *, run_id: str | None, run_name: str, **_: Any) -> Program:
        self.run_id = run_id or f"{run_name}-{len(self.seen)}"
        return self

    def search_experiments(self, filter_string: str) -> list[Any]:
        return []

    def create_experiment(self, **_: Any) -> str:
        return "1"

    def update(self, values: dict[str, Any], **_: Any) -> None:
        """Take settings."""

    def log_params(self, values: dict[str, Any]) -> None:
        """Take settings, but never another value, as MLflow does."""
        assert (self.params | values).items() >= self.params.items(), "changing is not allowed"
        self.params |= values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.seen.append((self.run_id, step))

    log_metrics = log

    def finish(self) -> None:
        """End."""

    end_run = finish


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_resumed_training_goes_on_in_the_same_run_of_another_program(
    name: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/finetrainers#188, lightly-ai/lightly-train#334, wandb/wandb#4482."""
    program, told = Program(name), list[str]()
    monkeypatch.setitem(sys.modules, name, program)
    log = tmp_path / "run/train" / LOG

    def train(first: int, last: int, **settings: Any) -> None:
        recipe = write_recipe(train={"trackers": [name], **settings})
        run = open_run(recipe, tmp_path / "run")
        log.parent.mkdir(exist_ok=True)
        trackers = Trackers(run, first - 1, told.append)
        for update in range(first, last + 1):
            record = {"update": update, "seconds": 1.0, "busy_s": 1.0 * update, "time": 1.0}
            append(log, record)
            trackers.log({**record, "loss": 1.0})
        trackers.close()

    train(1, 4)
    train(3, 6, early_stop=2, held_out_every=2)  # killed after 4, with a checkpoint of 2
    assert told == []
    assert [step for _, step in program.seen] == [1, 2, 3, 4, 5, 6], "none twice"
    assert len({one for one, _ in program.seen}) == 1
    log.parent.rename(tmp_path / "run/train.1")  # as `--from train` does
    train(1, 1)
    assert len({one for one, _ in program.seen}) == 2
