"""Checkpoints are whole, or they are not there."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from strixft.support.errors import HostError, StageError
from strixft.support.files import MANIFEST, folder_bytes, own_hash
from strixft.train import checkpoints as module
from strixft.train.checkpoints import KEPT, Checkpoints

INPUTS = {"recipe": {"train": {"epochs": 2}}, "rows_sha256": "a", "base": {"m.safetensors": "b"}}


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "run" / "train" / "checkpoints"


def opened(tmp_path: Path) -> Checkpoints:
    return Checkpoints(folder_of(tmp_path), INPUTS)


def write(checkpoints: Checkpoints, update: int, size: int = 1000) -> None:
    """A checkpoint of two files, one of them in a folder."""
    with checkpoints.writing(update) as folder:
        (folder / "inner").mkdir()
        (folder / "weights.bin").write_bytes(random.Random(update).randbytes(size))
        (folder / "inner" / "state.json").write_text("{}")


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in folder_of(tmp_path).iterdir())


def test_the_newest_one_is_found(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    assert checkpoints.newest() is None
    write(checkpoints, 9)
    write(checkpoints, 10)
    newest = opened(tmp_path).newest()
    assert newest is not None
    assert newest.update == 10
    assert newest.folder == folder_of(tmp_path) / "checkpoint-10"


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    for update in (1, 2, 3, 10):
        write(checkpoints, update)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]
    assert checkpoints.count() == KEPT


def cut(folder: Path) -> str:
    path = folder / "weights.bin"
    os.truncate(path, path.stat().st_size // 2)
    return "weights.bin is not what was written"


def flip(folder: Path) -> str:
    path = folder / "weights.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return "weights.bin is not what was written"


def lose(folder: Path) -> str:
    (folder / "inner" / "state.json").unlink()
    return "inner/state.json is missing"


def lose_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return f"{MANIFEST} is missing"


def empty_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("")
    return f"{MANIFEST} is damaged"


def cut_manifest(folder: Path) -> str:
    os.truncate(folder / MANIFEST, 40)
    return f"{MANIFEST} is damaged"


def list_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("[]")
    return f"{MANIFEST} is damaged"


DAMAGE = [cut, flip, lose, lose_manifest, empty_manifest, cut_manifest, list_manifest]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_torn_one_is_set_aside_and_named(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 1)
    write(checkpoints, 2)
    what = damage(folder_of(tmp_path) / "checkpoint-2")
    again = opened(tmp_path)
    newest = again.newest()
    assert newest is not None
    assert newest.update == 1
    assert again.torn == [f"checkpoint-2.torn: {what}"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2.torn"]


def test_files_of_other_programs_tear_nothing(tmp_path: Path) -> None:
    write(opened(tmp_path), 2)
    for folder in (folder_of(tmp_path), folder_of(tmp_path) / "checkpoint-2"):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "state-checkpoint.json").write_text("{}")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (folder / ".nfs000000000000001").symlink_to("gone")
        (folder / "notes.txt").write_text("mine")
    newest = opened(tmp_path).newest()
    assert newest is not None
    assert newest.update == 2
    assert (folder_of(tmp_path) / ".DS_Store").is_file()
    write(opened(tmp_path), 3)
    assert (folder_of(tmp_path) / ".ipynb_checkpoints").is_dir()


def test_torn_ones_are_all_kept(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints = opened(tmp_path)
        write(checkpoints, 2)
        cut(folder_of(tmp_path) / "checkpoint-2")
        assert checkpoints.newest() is None
    assert names(tmp_path) == ["checkpoint-2.torn", "checkpoint-2.torn-2"]


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 2)
    folder = folder_of(tmp_path)
    whole = (folder / "checkpoint-2" / MANIFEST).read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 4
        (folder / "checkpoint-2" / MANIFEST).write_bytes(data)
        assert checkpoints.newest() is None, at
        (folder / "checkpoint-2.torn").rename(folder / "checkpoint-2")
    (folder / "checkpoint-2" / MANIFEST).write_bytes(whole)
    assert checkpoints.newest() is not None


def test_a_key_in_a_recipe_is_not_written_and_changes_nothing(tmp_path: Path) -> None:
    inputs = {"recipe": {"model": "hf_" + "a1" * 20}}
    checkpoints = Checkpoints(folder_of(tmp_path), inputs)
    write(checkpoints, 2)
    assert "hf_" not in (folder_of(tmp_path) / "checkpoint-2" / MANIFEST).read_text()
    assert Checkpoints(folder_of(tmp_path), inputs).newest() is not None


def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 2)
    path = folder_of(tmp_path) / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../../../../etc/passwd"] = "0"
    path.write_text(json.dumps({"sha256": own_hash(manifest), **manifest}))
    assert checkpoints.newest() is None
    assert checkpoints.torn == ["checkpoint-2.torn: ../../../../etc/passwd is missing"]


def fill_the_disk(checkpoints: Checkpoints) -> None:
    """A checkpoint for which there is no room."""
    with checkpoints.writing(2):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 1)
    with pytest.raises(OSError, match="No space left"):
        fill_the_disk(checkpoints)
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    write(opened(tmp_path), 1)
    half = folder_of(tmp_path) / ".writing"
    half.mkdir(parents=True)
    (half / "weights.bin").write_bytes(b"half")
    newest = opened(tmp_path).newest()
    assert newest is not None
    assert newest.update == 1
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"recipe": {"train": {"epochs": 3}}}, "recipe.train.epochs: 2 there, 3 here"),
        ({"rows_sha256": "c"}, "rows_sha256: 'a' there, 'c' here"),
        ({"base": {"m.safetensors": "d"}}, "base.m.safetensors: 'b' there, 'd' here"),
    ],
)
def test_one_of_another_run_is_refused_with_what_differs(
    tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    write(opened(tmp_path), 1)
    with pytest.raises(StageError) as caught:
        Checkpoints(folder_of(tmp_path), INPUTS | changed).newest()
    assert caught.value.problem.endswith(f"what differs:\n  {told}")
    assert caught.value.fix.endswith(f"--run-dir {tmp_path / 'run'} --from train")
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_full_disk_refuses_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 1)
    write(checkpoints, 2)
    monkeypatch.setattr(module, "free_bytes", lambda folder: 10)
    monkeypatch.setattr("strixft.support.files.free_bytes", lambda folder: 10)
    with pytest.raises(HostError, match=r"is full: 0\.00 GiB left") as caught:
        write(checkpoints, 3)
    assert "files saved before are intact" in caught.value.problem
    assert caught.value.fix.startswith("df -h ")
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_oldest_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = opened(tmp_path)
    write(checkpoints, 1, size=4000)
    write(checkpoints, 2, size=4000)
    real = folder_bytes(folder_of(tmp_path))
    monkeypatch.setattr(module, "free_bytes", lambda folder: real + 100 - folder_bytes(folder))
    write(checkpoints, 3, size=4000)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
