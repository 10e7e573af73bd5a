"""`train/log.jsonl`: one line an update or held-out loss, only appended to; read while it grows.

A resumed training may repeat updates that were not saved: a later line of an update, and all that
follows it, takes the place of the earlier ones.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "log.jsonl"

MOST_POINTS = 1000
"""Points that a reader keeps for a curve; older ones are thinned."""

RECENT = 50
"""Updates whose time tells how long the next ones take."""

Record = dict[str, Any]

TIMED, EVALUATED = ("update", "seconds", "busy_s", "time"), ("update", "time")
"""Numbers that a line of an update has, and one of a held-out loss."""


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line, whatever a killed process left at the end of the file."""
    line = json.dumps(record) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())


def busy_seconds(path: Path, update: int) -> float:
    """Return the time of all updates up to this one, as the log has it."""
    reader = LogReader(path)
    reader.read()
    return max((one["busy_s"] for one in reader.points if one["update"] <= update), default=0.0)


def _put(records: list[Record], record: Record) -> None:
    """Put a record in the place of all that it follows; many are thinned."""
    while records and records[-1]["update"] >= record["update"]:
        records.pop()
    records.append(record)
    if len(records) > MOST_POINTS:
        del records[1:-1:2]


class LogReader:
    """Reads what was appended since the last time; its memory does not grow with the file.

    Args:
        path: The log; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_again()

    def _start_again(self) -> None:
        self._read_bytes = 0
        self.points: list[Record] = []
        """Records for a curve, in order; the last one is the newest."""
        self.recent: deque[Record] = deque(maxlen=RECENT)
        """The last updates of the process that trains."""
        self.evaluations: list[Record] = []
        """Held-out losses, in order; that of update 0 was taken before the first."""
        self.session: Record | None = None
        """First record of that process."""

    def read(self) -> None:
        """Take in the new lines; one that is not finished yet waits."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < self._read_bytes:
            self._start_again()
        if size == self._read_bytes:
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            whole, newline, _ = file.read(size - self._read_bytes).rpartition(b"\n")
        self._read_bytes += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            is_evaluation = "held_out_loss" in record
            keys = EVALUATED if is_evaluation else TIMED
            update, *_ = (record[key] + 0 for key in keys)
        except (ValueError, KeyError, TypeError):  # half a line of a process that was killed
            return
        if is_evaluation:
            _put(self.evaluations, record)
            return
        _put(self.points, record)
        while self.evaluations and self.evaluations[-1]["update"] >= update:
            self.evaluations.pop()
        if record.get("first"):
            self.session = record
            self.recent.clear()
        else:
            self.recent.append(record)

    def seconds_left(self, updates: int) -> float | None:
        """Return the time for the rest of the updates; None before the second of a process.

        The first one compiles and warms up. Time between updates, as for a checkpoint or an
        evaluation, counts as it came so far in this process.
        """
        if not self.recent:
            return None
        last = self.recent[-1]
        seconds = sum(record["seconds"] for record in self.recent) / len(self.recent)
        begun = self.session or self.recent[0]
        count = last["update"] - begun["update"]
        clock = "clock_s" if "clock_s" in last and "clock_s" in begun else "time"
        between = last[clock] - begun[clock] - (last["busy_s"] - begun["busy_s"])
        return float((updates - last["update"]) * (seconds + max(0.0, between) / max(1, count)))
