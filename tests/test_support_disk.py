"""Room on disk, and every way in which libraries say that there is none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from strixft.prepare.stage import prepare_recipe
from strixft.run.folder import Run
from strixft.support.errors import HostError, StageError
from strixft.support.files import cache_folder, folder_bytes, is_full, require_room


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_full_disk_is_known_by_its_error(error: Exception, tmp_path: Path) -> None:
    assert is_full(error, tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), ValueError("28"), OSError("?")])
def test_other_errors_are_no_full_disk(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_full(error, tmp_path)
    monkeypatch.setattr("strixft.support.files.free_bytes", lambda folder: 4096)
    assert is_full(error, tmp_path)
    assert not is_full(HostError("told already", fix="none"), tmp_path)


@pytest.mark.parametrize("below", ["", "deeper/cache"])
def test_a_file_where_the_cache_should_be_is_told(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(HostError) as caught:
        cache_folder()
    assert caught.value.problem == (
        f"the cache {tmp_path / 'file' / below} is not a folder: {tmp_path / 'file'} is a file"
    )
    assert caught.value.fix == "export STRIXFT_CACHE=…   with a folder that can be written"


def test_a_cache_that_is_not_there_yet_may_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIXFT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    monkeypatch.delenv("STRIXFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "strixft"


def test_room_that_is_not_there_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(HostError, match=r"GiB left, and 4294967296\.00 GiB are needed"):
        require_room(tmp_path, 2**62)


def test_a_folder_is_as_large_as_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"12345")
    (tmp_path / "d").write_bytes(b"1")
    assert folder_bytes(tmp_path) == 6


def test_a_stage_on_a_full_disk_ends_with_an_error_of_ours(tiny_run: Run) -> None:
    from strixft.prepare.stage import Prepared

    def full(folder: Path) -> tuple[dict[str, object], dict[str, object]]:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(HostError) as caught:
        tiny_run.once(Prepared, full)
    assert caught.value.problem.startswith(f"the disk of {tiny_run.folder} is full: ")
    assert caught.value.fix.startswith(f"df -h {tiny_run.folder}; make room")
    assert tiny_run.status()["state"] == "failed"


@pytest.mark.parametrize("name", ["prepare", "prepare/result.json", "prepare/problems.jsonl"])
def test_what_stands_in_the_way_of_a_stage_is_named(tiny_run: Run, name: str) -> None:
    path = tiny_run.folder / name
    path.mkdir(parents=True) if "/" in name else path.touch()
    with pytest.raises(StageError) as caught:
        prepare_recipe(tiny_run)
    assert caught.value.problem.startswith(
        f"stage prepare of {tiny_run.folder} cannot use {path}: "
    )
    assert caught.value.fix == (
        f"ls -ld {path}   shows what is there, and its owner; after that: {tiny_run.resume_command}"
    )
