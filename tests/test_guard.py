"""The guard: what it limits, what it sees, and when it acts."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.counters import GIB, Frame, Player, meminfo, recorded, strix_halo, strix_halo_fills

from strixft.guard.advice import finite_again, less_memory, loss_spikes
from strixft.guard.host import cap, cap_of
from strixft.guard.stage_watches import sleep_inhibited
from strixft.guard.watch import Counters, HangWatch, MemoryWatch, growth, level_of, read_counters
from strixft.recipe.load import check_recipe
from strixft.support.errors import FitError, StrixftError

# The cap.


def test_the_limit_is_a_share_of_what_torch_sees() -> None:
    assert cap_of(60 * GIB, 50 * GIB, 120 * GIB).fraction == 0.5


def test_where_torch_sees_half_of_it_the_plan_may_fit_in_that() -> None:
    found = cap_of(109 * GIB, 40 * GIB, round(62.47 * GIB))
    assert (found.fraction, found.warning) == (1.0, None)


def test_where_the_plan_needs_more_than_torch_sees_only_the_watch_is_left() -> None:
    found = cap_of(109 * GIB, 70 * GIB, round(62.47 * GIB))
    assert found.fraction is None
    assert found.warning is not None
    assert found.warning.startswith("torch sees 62.47 GiB and the plan needs 70.00 GiB")


def test_torch_takes_every_limit_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []

    class Properties:
        total_memory = 64 * GIB

    monkeypatch.setenv("STRIXFT_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    for budget, needed in ((32, 8), (109, 40), (109, 70)):
        cap(budget * GIB, needed * GIB)
    assert set_to == [0.5, 1.0]
    assert all(0 < fraction <= 1 for fraction in set_to)


def test_a_cpu_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIXFT_DEVICE", "cpu")
    assert cap(GIB, GIB).fraction is None


# The counters.


def root_with(tmp_path: Path, files: dict[str, str]) -> Path:
    Frame(0, files).write(tmp_path)
    return tmp_path


def test_all_counters_are_read(tmp_path: Path) -> None:
    files = {**strix_halo(100, 40, full=1.5), "proc/self/status": "VmRSS:\t 2048 kB\n"}
    found = read_counters(root_with(tmp_path, files))
    assert (found.total_bytes, found.available_bytes) == (125 * GIB, 40 * GIB)
    assert (found.gtt_used_bytes, found.stalled_percent) == (100 * GIB, 1.5)
    assert found.process_bytes == 2 * 2**20


def test_the_worse_of_two_counters_counts(tmp_path: Path) -> None:
    hidden = read_counters(root_with(tmp_path, strix_halo(110, available_gib=40)))
    seen = read_counters(root_with(tmp_path, strix_halo(0, available_gib=9)))
    assert (hidden.left_bytes, seen.left_bytes) == (15 * GIB, 9 * GIB)


def test_a_machine_without_a_gpu_or_pressure_has_counters_too(tmp_path: Path) -> None:
    found = read_counters(root_with(tmp_path, {"proc/meminfo": meminfo(24, 20)}))
    assert (found.gtt_used_bytes, found.stalled_percent, found.process_bytes) == (None, None, None)
    assert found.left_bytes == 20 * GIB


def counters(**values: Any) -> Counters:
    usual: dict[str, Any] = {
        "total_bytes": 125 * GIB,
        "available_bytes": 100 * GIB,
        "swap_used_bytes": 0,
        "gtt_used_bytes": 0,
        "vram_used_bytes": 0,
        "process_bytes": 0,
        "stalled_percent": 0.0,
    }
    return Counters(**usual | values)


def test_growth_is_named_with_its_size() -> None:
    now = counters(
        available_bytes=60 * GIB, gtt_used_bytes=30 * GIB, process_bytes=GIB, swap_used_bytes=GIB
    )
    assert growth(counters(), now) == (
        "device memory in GTT +30.00 GiB, this process +1.00 GiB, swap +1.00 GiB,"
        " other programs +10.00 GiB"
    )


@pytest.mark.parametrize(
    ("left_gib", "stalled", "level"),
    [
        (16, 0, "calm"),
        (15.9, 0, "warn"),
        (15.9, 60, "stop"),
        (20, 60, "calm"),
        (7.9, 0, "stop"),
        (3.9, 0, "exit"),
    ],
)
def test_levels_are_the_reserve_and_its_half_and_quarter(
    left_gib: float, stalled: float, level: str
) -> None:
    now = counters(available_bytes=round(left_gib * GIB), stalled_percent=stalled)
    assert level_of(now, 16 * GIB) == level


# The watch.


class Heard:
    """What a watch did."""

    def __init__(self, root: Path, reserve_gib: float) -> None:
        self.acts: list[tuple[str, float]] = []
        self.texts: list[str] = []
        self.watch = MemoryWatch(
            round(reserve_gib * GIB),
            warn=lambda text: self._note("warn", text),
            ask=lambda error: self._note("stop", error.problem),
            leave=lambda error: self._note("exit", error.problem),
            root=root,
        )

    def _note(self, act: str, text: str) -> None:
        self.acts.append((act, time.monotonic()))
        self.texts.append(text)


def test_memory_that_fills_is_warned_of_then_stopped_then_left(tmp_path: Path) -> None:
    frames = strix_halo_fills(seconds=4, begin=90, end=124)
    player = Player(frames, tmp_path)
    heard = Heard(tmp_path, 16)
    with heard.watch:
        player.start()
        player.join()
        time.sleep(1)
    assert [act for act, _ in heard.acts] == ["warn", "stop", "exit"]
    assert "device memory in GTT +" in heard.texts[1]
    assert heard.texts[1].startswith("stopped before the host runs out of memory: the host has ")
    assert heard.watch.least_left_bytes <= 2 * GIB


def test_a_recorded_machine_that_fills_is_stopped(tmp_path: Path) -> None:
    frames = recorded()
    player = Player([Frame(frame.seconds / 4, frame.files) for frame in frames], tmp_path)
    heard = Heard(tmp_path, 22)  # half of it is reached in the middle of the recording
    with heard.watch:
        player.start()
        player.join()
        time.sleep(1)
    assert [act for act, _ in heard.acts] == ["warn", "stop"]
    assert "this process +" in heard.texts[1]


def test_a_host_that_is_nearly_full_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    heard = Heard(root_with(tmp_path, strix_halo(118)), 16)
    with pytest.raises(FitError, match=r"has 7\.00 GiB left, and its reserve is 16\.00 GiB"):
        heard.watch.require_reserve()


def test_counters_that_vanish_end_no_run(tmp_path: Path) -> None:
    heard = Heard(root_with(tmp_path, strix_halo(10)), 16)
    shutil.rmtree(tmp_path / "proc")
    assert heard.watch.look() == "calm"
    assert heard.acts == []


def test_a_reserve_of_nothing_watches_nothing(tmp_path: Path) -> None:
    assert Heard(root_with(tmp_path, strix_halo(124.9)), 0).watch.look() == "calm"


# The device.


def test_a_device_that_hangs_leaves_its_stacks(tmp_path: Path) -> None:
    errors: list[StrixftError] = []
    stacks = tmp_path / "stacks.txt"
    with HangWatch(stacks, errors.append, least_s=0.2) as watch:
        for _ in range(5):
            watch.beat()
        deadline = time.monotonic() + 20
        while not errors and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "the device hangs: no micro-batch ended within" in errors[0].problem
    assert "test_a_device_that_hangs_leaves_its_stacks" in stacks.read_text()


def test_a_checkpoint_is_no_hang(tmp_path: Path) -> None:
    errors: list[StrixftError] = []
    with HangWatch(tmp_path / "stacks.txt", errors.append, least_s=0.1) as watch:
        for _ in range(5):
            watch.beat()
        watch.pause()
        time.sleep(0.5)
    assert errors == []
    assert not (tmp_path / "stacks.txt").exists()


def test_the_limit_is_ten_times_the_median(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path / "stacks.txt", lambda error: None, least_s=0)
    assert watch.limit_s() is None
    watch._seconds.extend([900, 2, 3, 4, 3])
    assert watch.limit_s() == 30


HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from strixft.guard.watch import HangWatch
with HangWatch(Path(sys.argv[1]), print, least_s=0.2, grace_s=0.3) as watch:
    for _ in range(5):
        watch.beat()
    ctypes.PyDLL(None).sleep(60)  # keeps Python's lock, as a driver's call may
"""


def test_a_call_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    found = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK, stacks], timeout=50)
    assert found.returncode == 1
    assert "Timeout" in stacks.read_text()


# Sleep.


def program(folder: Path, script: str) -> None:
    path = folder / "systemd-inhibit"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_machine_is_kept_awake_as_long_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, f'echo "$@" > {tmp_path}/asked; exec "$5"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with sleep_inhibited() as kept:
        assert kept
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--what=sleep:idle --who=strixft")


def test_where_systemd_does_not_answer_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with sleep_inhibited() as kept:
        assert not kept
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with sleep_inhibited() as kept:
        assert not kept


# Numbers.


def test_losses_that_only_fall_have_no_spikes() -> None:
    assert loss_spikes([3 * 0.97**step for step in range(200)]) == []
    assert loss_spikes([]) == loss_spikes([9.0, 1.0]) == []


def test_a_jump_is_marked_and_noise_is_not() -> None:
    losses = [2 + 0.1 * (-1) ** step for step in range(60)]
    losses[40] = 5
    assert loss_spikes(losses) == [41]


RECIPE = check_recipe({"model": "m", "dataset": {"source": "rows.jsonl"}}, name="r")
PLAN: dict[str, Any] = {
    "parts": {"weights": 30, "activations": 50, "adapter": 1},
    "choice": {
        "micro_batch_rows": 4,
        "max_length": 4096,
        "recomputed_layers": 0,
        "num_layers": 8,
    },
}


def test_the_two_settings_that_help_most_follow_from_the_plan() -> None:
    text = less_memory(RECIPE, PLAN)
    assert text == (
        "close other programs, or add --set train.micro_batch=1 --from plan"
        " or --set train.recompute=all --from plan"
    )
    weights = {**PLAN, "parts": {"weights": 90, "activations": 5}}
    text = less_memory(RECIPE, weights)
    assert "--set method=qlora --from plan or --set train.micro_batch=1 --from plan" in text


def test_settings_that_are_used_up_are_not_advised() -> None:
    choice = {**PLAN["choice"], "micro_batch_rows": 1, "recomputed_layers": 8}
    text = less_memory(RECIPE, {**PLAN, "choice": choice})
    assert "--set dataset.max_length=2048 --from prepare or --set method=qlora" in text


def test_advice_follows_the_known_causes() -> None:
    known: dict[str, Any] = {"is_float16": False, "model_type": "llama"}
    first = finite_again(RECIPE, 1, device="cpu", **known)
    assert first.endswith("another base: no weight had been changed yet")
    later = finite_again(RECIPE, 7, device="cpu", **known)
    assert "--set train.learning_rate=1e-05" in later
    gemma = finite_again(RECIPE, 7, device="cuda", is_float16=True, model_type="gemma3_text")
    assert "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=0" in gemma
    assert "unslothai/unsloth#3385" in gemma
    assert "float16 overflows" in gemma
