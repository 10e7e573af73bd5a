"""A lock ends with its process, and names it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from strixft.support.errors import HostError, StageError
from strixft.support.locks import Owner, hold, read_owner, this_process


def test_the_owner_is_named_with_its_start(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", tmp_path, 0):
        owner = read_owner(tmp_path / ".lock")
    assert owner == this_process()
    assert owner is not None
    assert owner.is_alive
    assert read_owner(tmp_path / ".lock") is None  # its process lives on, and is not to be stopped


def test_a_number_that_is_used_again_is_another_process() -> None:
    assert not replace(this_process(), start="an earlier boot 1").is_alive


def test_of_another_machine_nothing_is_known() -> None:
    far = Owner(1, None, "elsewhere.test")
    assert far.is_alive
    assert not far.is_here


@pytest.mark.parametrize("text", ["", "123\n", "{}", '{"pid": 1}', "[1]"])
def test_a_damaged_name_is_no_owner(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    assert read_owner(tmp_path / ".lock") is None
    with hold(tmp_path / ".lock", tmp_path, 0):
        assert read_owner(tmp_path / ".lock") == this_process()


def fork_and_wait() -> int:
    """A child that lives until it is killed."""
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    return pid


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", tmp_path, 0):
        child = fork_and_wait()
    with hold(tmp_path / ".lock", tmp_path, 5):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_whose_named_owner_has_ended_says_so(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        path.write_text(json.dumps(asdict(replace(this_process(), pid=2**22 - 1))))
        with pytest.raises(StageError, match="has ended, but a process that it started") as caught:
            hold(path, tmp_path, 0).__enter__()
    assert caught.value.fix == f"fuser -v {path}   shows which"


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("_no_locks")
def test_where_the_file_system_has_no_locks_a_living_owner_counts(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    child = fork_and_wait()
    start = replace(this_process(), pid=child)
    stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    assert start.start is not None
    alive = replace(start, start=f"{start.start.split()[0]} {stat[19]}")
    path.write_text(json.dumps(asdict(alive)))
    with pytest.raises(StageError, match=f"process {child} is at work"):
        hold(path, tmp_path, 0).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with hold(path, tmp_path, 0):
        assert read_owner(path) == this_process()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be written: No such file") as caught:
        hold(tmp_path / "none" / ".lock", tmp_path, 0).__enter__()
    assert "--run-dir and another folder" in caught.value.fix
