"""What people see of a run while it goes on: its log, the time left, the page, the command."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe, chats

from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.run.live import View
from strixft.run.log import MOST_POINTS, LogReader, append
from strixft.run.open import open_run
from strixft.run.show import curves, lines, loss_points, one_line, to_html, write_page
from strixft.support.progress import progress_bar
from strixft.train.stage import train_recipe

STAGES = ("prepare", "plan", "train", "evaluate", "export")


def a_record(update: int, **more: Any) -> dict[str, Any]:
    return {"update": update, "seconds": 2.0, "busy_s": 2.0 * update, "time": 3.0 * update, **more}


def a_view(**more: Any) -> View:
    status = {"stage": "train", "state": "running", "updated": "2026-11-30T10:00:00+00:00"}
    last = a_record(7, loss=1.25, learning_rate=1e-4, grad_norm=0.5, tok_per_s=90.0)
    return View(
        name="r",
        status={**status, "doing": {"what": "train", "done": 7, "total": 9, "unit": "update"}},
        stages=dict.fromkeys(STAGES, False) | {"prepare": True, "plan": True},
        planned={"tok_per_s": 100.0},
        points=[{**last, "update": 6, "loss": 2.0}, last],
        last=last,
        elapsed_s=61.0,
        left_s=120.0,
        **more,
    )


# The log.


def test_a_reader_takes_in_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    reader = LogReader(path)
    reader.read()
    assert reader.points == []
    append(path, a_record(1, first=True))
    reader.read()
    append(path, a_record(2))
    append(path, a_record(3))
    reader.read()
    assert [one["update"] for one in reader.points] == [1, 2, 3]


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append(path, a_record(1, first=True))
    with path.open("a") as file:
        file.write('{"update": 2, "sec')
    reader = LogReader(path)
    reader.read()
    assert [one["update"] for one in reader.points] == [1]
    append(path, a_record(2, first=True))
    reader.read()
    assert [one["update"] for one in reader.points] == [1, 2]


def test_updates_that_were_lost_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for update in (1, 2, 3, 4):
        append(path, a_record(update, loss=float(update)))
    append(path, a_record(3, loss=30.0, first=True))
    reader = LogReader(path)
    reader.read()
    assert [one["loss"] for one in reader.points] == [1.0, 2.0, 30.0]


def test_a_long_log_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(a_record(n)) + "\n" for n in range(1, 20_001)))
    reader = LogReader(path)
    reader.read()
    assert len(reader.points) <= MOST_POINTS
    updates = [one["update"] for one in reader.points]
    assert (updates[0], updates[-1]) == (1, 20_000)
    assert updates == sorted(updates)


def simulate(path: Path, seconds: float, seed: int) -> list[tuple[float | None, float]]:
    """100 updates with noise of 0.3, the first with a compilation, an evaluation every ten.

    Returns the time left after each update, as found and in truth.
    """
    draw, reader = random.Random(seed), LogReader(path)
    at = busy = 0.0
    found, times = [], []
    for update in range(1, 101):
        took = seconds * math.exp(draw.gauss(-0.045, 0.3)) + 4 * seconds * (update == 1)
        busy, at = busy + took, at + took
        first = {"first": True} if update == 1 else {}
        append(path, {"update": update, "seconds": took, "busy_s": busy, "time": at, **first})
        reader.read()
        found.append(reader.seconds_left(100))
        times.append(at)
        at += 2 * seconds if update % 10 == 0 else 0.0
    return [(one, times[-1] - time) for one, time in zip(found, times, strict=True)]


@pytest.mark.parametrize("seconds", [1.0, 31.0, 1200.0])
def test_the_time_left_is_known_and_near(seconds: float, tmp_path: Path) -> None:
    """Two updates with such noise cannot tell their mean to 25 % each time; thirty can."""
    runs = [simulate(tmp_path / f"{seed}.jsonl", seconds, seed) for seed in range(30)]
    assert all(left is None for left, _ in (run[0] for run in runs))
    off = [[abs((left or 0) / true - 1) for left, true in run[1:-1]] for run in runs]
    assert statistics.median(one[1] for one in off) < 0.25  # after three updates
    assert max(max(one[30:60]) for one in off) < 0.25


def test_the_time_left_after_a_resume_is_that_of_this_process(tmp_path: Path) -> None:
    """unslothai/unsloth#11297: it divided this process's time by the updates of all."""
    path = tmp_path / "log.jsonl"
    for update in range(1, 901):
        append(path, a_record(update, seconds=1.0, busy_s=1.0 * update, clock_s=1.0 * update))
    for count in range(11):
        more = {"seconds": 6.0, "busy_s": 900.0 + 6 * count, "clock_s": 50.0 + 6 * count}
        append(path, a_record(900 + count, **more, **({} if count else {"first": True})))
    reader = LogReader(path)
    reader.read()
    assert reader.seconds_left(1000) == pytest.approx(540)


def test_weights_that_are_read_end_no_training() -> None:
    """A bar of bytes beside the training's own; seen in the browser as `iB 269,030,016`."""
    view = a_view()
    doing = {"what": "weights", "done": 2**28, "total": 2**30, "unit": "iB"}
    loading = View(**{**vars_of(view), "status": {**view.status, "doing": doing}})
    line = one_line(loading)
    assert "train: running, weights, 256.0 MiB of 1.00 GiB" in line
    assert "time left, weights 2 min 0 s" in line


def test_a_start_that_hangs_has_no_time_left(tiny_run: Run) -> None:
    doing = {"what": "download", "done": 600, "total": 140 * 10**9, "unit": "B"}
    doing["elapsed_s"] = 1200.0
    with tiny_run.owned():
        tiny_run.set_status(stage="train", state="running", doing=doing)
        view = tiny_run.observer().look()
    assert view.state == "running"
    assert view.left_s is None
    assert "download, 0.0 MiB of 130.39 GiB" in one_line(view)
    to_html(view)


def test_a_clock_that_jumps_changes_no_time_left(tmp_path: Path) -> None:
    """NTP sets the clock an hour ahead, and back."""
    path = tmp_path / "log.jsonl"
    for update, jump_s in enumerate([0, 0, 0, 3600, 3600, -3600], 1):
        first = {"first": True} if update == 1 else {}
        append(path, a_record(update, clock_s=3.0 * update, **first) | {"time": jump_s})
    reader = LogReader(path)
    reader.read()
    assert reader.seconds_left(16) == pytest.approx(30.0)


def test_a_start_in_the_future_is_no_negative_time(tiny_run: Run) -> None:
    tiny_run.set_status(stage="train", state="running", started="2999-01-01T00:00:00+00:00")
    assert tiny_run.observer().look().elapsed_s == 0.0


OTHER_VERSIONS: list[dict[str, Any]] = [
    {"stage": "train", "state": "running", "started": "today", "doing": [1, 2]},
    {"stage": "train", "state": "done", "started": None, "updated": 7, "warnings": None},
    {"stage": "later-stage", "state": "failed", "problem": "x", "doing": {"what": None}},
    {"state": "queued"},
]


@pytest.mark.parametrize("status", OTHER_VERSIONS)
def test_a_run_of_another_version_is_shown(tiny_run: Run, status: dict[str, Any]) -> None:
    log = tiny_run.folder / "train/log.jsonl"
    log.parent.mkdir()
    append(log, {"update": 1})
    append(log, a_record(2))
    append(log, {**a_record(3), "update": "x"})
    (tiny_run.folder / "plan").mkdir()
    (tiny_run.folder / "plan/result.json").write_text('{"figures": {"tok_per_s": null}}')
    (tiny_run.folder / "status.json").write_text(json.dumps(status))
    view = tiny_run.observer().look()
    assert [one["update"] for one in view.points] == [2]
    assert tiny_run.name in to_html(view)
    assert lines(view)
    assert one_line(view)


# What is shown.


class _Strict(HTMLParser):
    """Collects text and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.addresses = "", [""]
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_shows_the_run_beside_its_plan(tmp_path: Path) -> None:
    write_page(tmp_path, a_view())
    page = (tmp_path / "live.html").read_text()
    seen = _Strict(page)
    for text in ("update 7 of 9", "1.250", "plan 100, -10%", "2 min 0 s", "ends at", "✓ plan"):
        assert text in seen.text, text
    assert seen.addresses == [""]
    assert 'http-equiv="refresh" content="3"' in page
    assert "<polyline" in page
    assert 'stroke="currentColor"' in page


def test_a_page_between_two_stages_still_looks_for_the_next(tmp_path: Path) -> None:
    view = a_view()
    ended = View(**{**vars_of(view), "status": {**view.status, "state": "done"}, "left_s": None})
    write_page(tmp_path, ended)
    assert 'http-equiv="refresh" content="30"' in (tmp_path / "live.html").read_text()


def vars_of(view: View) -> dict[str, Any]:
    return {name: getattr(view, name) for name in View.__dataclass_fields__}


def test_text_from_elsewhere_is_shown_as_text() -> None:
    view = a_view()
    status = {**view.status, "state": "failed", "problem": "<b>\x1b[31m", "fix": "a & b"}
    bad = View(**{**vars_of(view), "name": "<script>", "status": status})
    page = to_html(bad)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "\x1b" not in page + "".join(lines(bad))
    assert "fix: a & b" in "\n".join(lines(bad))


def test_one_line_says_it_all() -> None:
    line = one_line(a_view())
    assert line.startswith("train: running, update 7 of 9, loss 1.250, tokens/s 90, elapsed 1 min")
    assert "time left 2 min 0 s, ends at " in line


def test_a_curve_needs_two_points_and_stands_a_flat_line() -> None:
    assert curves({}) == ""
    assert loss_points(a_view(evaluations=[{"update": 0, "held_out_loss": 2.0}])).keys() == {
        "training loss"
    }
    assert "nan" not in curves({"training loss": [(1, 2.0), (2, 2.0)]})


EVALUATIONS = [
    {"update": 0, "held_out_loss": 3.0, "general_loss": 2.0},
    {"update": 4, "held_out_loss": 1.0, "general_loss": None},
    {"update": 6, "held_out_loss": 1.5, "general_loss": 2.25},
]


def test_held_out_losses_stand_in_the_same_picture() -> None:
    view = a_view(evaluations=EVALUATIONS)
    page = to_html(view)
    assert page.count("<polyline") == 3
    assert page.count("<svg") == 1
    for text in ("held-out loss", "lowest 1.000 at update 4", "general texts", "first 2.000"):
        assert text in page, text
    assert ", held-out loss 1.500, tokens/s 90" in one_line(view)
    assert view.to_dict()["last_held_out"] == EVALUATIONS[-1]


def test_held_out_losses_of_updates_that_were_lost_are_replaced(tmp_path: Path) -> None:
    path, reader = tmp_path / "log.jsonl", LogReader(tmp_path / "log.jsonl")
    for record in ({"update": 0}, {"update": 2}, {"update": 4}):
        append(path, {**record, "held_out_loss": 1.0, "general_loss": 1.0, "time": 1.0})
    append(path, a_record(3, loss=1.0))
    reader.read()
    assert [one["update"] for one in reader.evaluations] == [0, 2]
    assert [one["update"] for one in reader.points] == [3]


# A real run.


@pytest.fixture
def trained(write_recipe: WriteRecipe, tmp_path: Path) -> Run:
    train = {"epochs": 1, "tokens_per_update": 40, "micro_batch": 1}
    recipe = write_recipe(rows=chats(12), train=train, dataset={"packing": False})
    run = open_run(recipe, tmp_path / "run")
    import strixft

    strixft.prepare_recipe(run)
    strixft.plan_recipe(run)
    train_recipe(run)
    return run


def test_a_training_leaves_a_log_and_a_page(trained: Run) -> None:
    figures = json.loads((trained.folder / "train/result.json").read_text())["figures"]
    log = [json.loads(line) for line in (trained.folder / "train/log.jsonl").open()]
    assert [one["loss"] for one in log] == figures["losses"]
    assert [one["update"] for one in log] == list(range(1, figures["updates"] + 1))
    assert log[-1]["tokens"] == figures["tokens"]
    assert all(one["grad_norm"] > 0 and one["learning_rate"] > 0 for one in log)
    assert figures["train_seconds"] == pytest.approx(sum(one["seconds"] for one in log), abs=0.1)
    assert "train: done" in _Strict((trained.folder / "live.html").read_text()).text


def test_the_command_shows_a_run(trained: Run) -> None:
    words = [sys.executable, "-m", "strixft", "watch", str(trained.folder)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "train ✓" in shown
    told = json.loads(subprocess.check_output([*words, "--json"], text=True))
    assert told["stages"]["train"] is True
    assert told["last_update"]["update"] == len(
        (trained.folder / "train/log.jsonl").read_text().splitlines()
    )


def test_every_bar_is_in_the_status(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    run = open_run(write_recipe(rows=chats(3)), tmp_path / "run")
    seen: list[View] = []

    def work(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        for _ in progress_bar(range(4), desc="answers", unit="batch"):
            time.sleep(0.2)
            seen.append(run.observer().look())
        return {}, {"x": 1}

    run.once(Prepared, work)
    assert [one.progress["what"] for one in seen] == ["answers"] * 4
    assert seen[-1].progress["total"] == 4
    assert seen[-1].left_s is not None
    assert "answers, batch" in one_line(seen[-1])
