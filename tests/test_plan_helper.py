"""A second process for traces: it helps, and a plan does without it whatever becomes of it."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig

from strixft.catalog.hosts import HOSTS, Budget
from strixft.plan import helper
from strixft.plan.choose import Choice, DataShape, choose
from strixft.plan.helper import Helper
from strixft.probe.job import Job
from strixft.recipe.schema import Dataset, Recipe
from strixft.support.units import GIB


@pytest.fixture(autouse=True)
def _copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "can_copy", lambda: True)
    monkeypatch.setattr(helper, "LEAST_S", 1.0)


def act(path: Path, how: str) -> None:
    """Write this process's number; then end as asked."""
    path.write_text(str(os.getpid()))
    if how == "raises":
        raise ValueError
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(600)


@pytest.mark.parametrize("how", ["ends", "raises", "dies", "hangs"])
def test_a_helper_works_beside_the_plan_however_it_ends(how: str, tmp_path: Path) -> None:
    found = tmp_path / "first", tmp_path / "second"
    with Helper(act) as other:
        for path in found:
            with other.beside(path, how):
                pass
    assert found[0].read_text() != str(os.getpid())
    assert found[1].exists() == (how in ("ends", "raises"))


def test_an_error_of_the_plan_is_not_hidden(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="disk"),
        Helper(act) as other,
        other.beside(tmp_path / "pid", "ends"),
    ):
        raise OSError("disk")


def test_a_helper_ends_with_a_plan_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    if not (plan := os.fork()):
        with Helper(act).beside(path, "ends"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(plan, 0)
    with contextlib.suppress(psutil.NoSuchProcess):
        other, until = psutil.Process(int(path.read_text())), time.monotonic() + 60
        while other.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_plan_is_the_same_with_and_without_a_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", num_hidden_layers=5, **sides, **heads)
    recipe = Recipe(model="none", dataset=Dataset(source="none", packing=False, max_length=64))

    def planned(name: str) -> Choice:
        monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / name))
        job = Job.of(recipe, config, HOSTS["strix-halo-128"])
        return choose(job, Budget(GIB, "test"), DataShape(64))

    helped = planned("two processes")
    monkeypatch.setattr(helper, "can_copy", lambda: False)
    assert planned("one process") == helped
