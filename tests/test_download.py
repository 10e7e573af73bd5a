"""A model of the hub is downloaded if there is room, and goes on where it was broken off."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import MODEL, Hub, serving_hub

from strixft.model.files import fetch

BYTES = 3_000_000
FETCH = """
import sys
import strixft.model.files as files
if len(sys.argv) > 2:
    files.free_bytes = lambda folder: int(sys.argv[2])
print(files.fetch(sys.argv[1], offline=False))
"""
"""A process of its own: the hub's address is read when its library is imported."""


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A model of two parts, and files that are not needed."""
    folder = tmp_path / "on-the-hub"
    folder.mkdir()
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in (*parts, "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(random.Random(name).randbytes(BYTES))
    weights = ", ".join(f'"{n}.weight": "{part}"' for n, part in enumerate(parts))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Hub(folder)


def fetched(
    hub: Hub, tmp_path: Path, *free: int, address: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What a process that fetches the model prints."""
    with serving_hub(hub) as here:
        environment = os.environ | {
            "HF_ENDPOINT": address or here,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        environment.pop("HF_HUB_OFFLINE")
        words = [sys.executable, "-c", FETCH, MODEL, *map(str, free)]
        return subprocess.run(words, capture_output=True, text=True, env=environment)


def weights_sent(hub: Hub) -> list[str]:
    return sorted(name for name, _ in hub.sent if name.endswith(".safetensors"))


def test_only_what_is_needed_is_downloaded_and_only_once(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        done = fetched(hub, tmp_path)
        folder = Path(done.stdout.strip())
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }, done.stderr
    for path in folder.iterdir():
        assert path.read_bytes() == (hub.folder / path.name).read_bytes()
    assert len(hub.sent) == 4
    done = fetched(hub, tmp_path, address="http://127.0.0.1:9")  # nobody answers there
    assert Path(done.stdout.strip()) == folder


def test_without_room_nothing_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    done = fetched(hub, tmp_path, 2**30 + 2 * BYTES - 1)
    assert done.returncode != 0
    assert "HostError: the disk of " in done.stderr
    assert ", and 1.01 GiB are needed; " in done.stderr
    assert weights_sent(hub) == []
    assert fetched(hub, tmp_path, 2**30 + 2 * BYTES).returncode == 0


def test_a_connection_that_breaks_goes_on_within_the_file(hub: Hub, tmp_path: Path) -> None:
    first, size = "model-00001-of-00002.safetensors", 25 * 2**20  # the library takes 10 MiB at once
    (hub.folder / first).write_bytes(random.Random(1).randbytes(size))
    hub.broken[first] = 1
    done = fetched(hub, tmp_path)
    if done.returncode:  # huggingface_hub before 2
        done = fetched(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (first, f"bytes={10 * 2**20}-") in hub.sent
    assert (Path(done.stdout.strip()) / first).read_bytes() == (hub.folder / first).read_bytes()


def test_a_download_that_never_ends_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.broken["model-00001-of-00002.safetensors"] = 100
    done = fetched(hub, tmp_path)
    assert f"HostError: the download of {MODEL} was interrupted: " in done.stderr
    assert "fix: run the same command again: completed files are kept" in done.stderr


def test_a_download_that_was_stopped_goes_on_with_the_missing_files(
    hub: Hub, tmp_path: Path
) -> None:
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    hub.refused = {second}
    assert fetched(hub, tmp_path).returncode != 0
    assert weights_sent(hub) == [first]
    hub.refused, hub.sent = set(), []
    done = fetched(hub, tmp_path, 2**30 + BYTES)  # one of the two is here, so less is needed
    assert done.returncode == 0, done.stderr
    assert weights_sent(hub) == [second]


def test_offline_takes_what_is_here(hub: Hub, tmp_path: Path) -> None:
    assert fetch(str(hub.folder), offline=False) == hub.folder
    assert fetch("nobody/nothing", offline=True) is None
    assert hub.sent == []
