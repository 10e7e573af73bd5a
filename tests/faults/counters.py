"""Memory counters of a machine over time, played back into a folder that stands for its root.

`tests/counters/2-cores-24-gib.jsonl` was recorded while a process took 2 GiB. That of a Strix Halo
is written, not recorded: device memory that grows in GTT and that `MemAvailable` does not see, as
ggml-org/llama.cpp PR #20472 describes it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
FOLDER = Path(__file__).resolve().parent.parent / "counters"


@dataclass(frozen=True)
class Frame:
    """Files of the kernel at one moment."""

    seconds: float
    files: Mapping[str, str]

    def write(self, root: Path) -> None:
        """Put them below a folder, each by rename."""
        for name, text in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.new")
            temporary.write_text(text)
            temporary.rename(path)


def recorded(name: str = "2-cores-24-gib", less_gib: float = 0) -> list[Frame]:
    """The frames of a file.

    Args:
        name: Which one.
        less_gib: Taken off what is available in all of them: a smaller host.
    """
    lines = (FOLDER / f"{name}.jsonl").read_text().splitlines()
    frames = [Frame(**json.loads(line)) for line in lines]
    return [Frame(frame.seconds, _with_less(frame.files, less_gib)) for frame in frames]


def _with_less(files: Mapping[str, str], less_gib: float) -> dict[str, str]:
    text = re.sub(
        r"(?<=MemAvailable:)\s*(\d+)",
        lambda match: f" {int(match[1]) - round(less_gib * 2**20)}",
        files["proc/meminfo"],
    )
    return {**files, "proc/meminfo": text}


def meminfo(total_gib: float, available_gib: float) -> str:
    """`/proc/meminfo` with what is read of it."""
    sizes = {"MemTotal": total_gib, "MemAvailable": available_gib, "SwapTotal": 0, "SwapFree": 0}
    return "".join(f"{name}: {round(gib * 2**20)} kB\n" for name, gib in sizes.items())


def pressure(full_percent: float) -> str:
    """`/proc/pressure/memory`."""
    return "".join(
        f"{kind} avg10={full_percent:.2f} avg60=0.00 avg300=0.00 total=0\n"
        for kind in ("some", "full")
    )


def strix_halo(gtt_used_gib: float, available_gib: float = 40, full: float = 0) -> dict[str, str]:
    """The files of a Strix Halo of 128 GB with GTT raised."""
    card = "sys/class/drm/card1/device"
    sizes = {"gtt_total": 120.0, "gtt_used": gtt_used_gib, "vram_total": 0.5, "vram_used": 0.1}
    memory = {f"{card}/mem_info_{name}": f"{round(gib * GIB)}\n" for name, gib in sizes.items()}
    return {
        "proc/meminfo": meminfo(125, available_gib),
        "proc/pressure/memory": pressure(full),
        f"{card}/vendor": "0x1002\n",
        f"{card}/device": "0x1586\n",
        **memory,
    }


def strix_halo_fills(seconds: float = 4, begin: float = 80, end: float = 119) -> list[Frame]:
    """Device memory that grows evenly."""
    count = int(seconds * 10)
    return [
        Frame(at / 10, strix_halo(begin + (end - begin) * at / count)) for at in range(count + 1)
    ]


class Player(threading.Thread):
    """Plays frames at their times; the last one stays.

    Args:
        frames: What to play.
        root: The folder that stands for the machine.
    """

    def __init__(self, frames: Sequence[Frame], root: Path) -> None:
        super().__init__(daemon=True)
        self._frames, self._root = frames, root
        self.times: list[float] = []
        """When each frame was written, by the monotonic clock."""
        frames[0].write(root)

    def run(self) -> None:
        """Write one frame after the other."""
        began = time.monotonic()
        for frame in self._frames:
            time.sleep(max(0.0, began + frame.seconds - time.monotonic()))
            frame.write(self._root)
            self.times.append(time.monotonic())
