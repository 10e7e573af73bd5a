"""Recorded hosts: `tests/hosts/complete/*.yaml` and `tests/hosts/faults.yaml`, as a `HostView`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from strixft.doctor.host import HostView, User
from strixft.support.child import Probe
from strixft.support.units import GIB

HOSTS = Path(__file__).parent / "hosts"
UNREADABLE = "unreadable"
"""A folder in the file's place: reading it is an error, for root too."""


def _merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in change.items():
        deeper = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _merged(both[key], value) if deeper else value
    return both


def _load() -> dict[str, dict[str, Any]]:
    files = sorted((HOSTS / "complete").glob("*.yaml"))
    hosts = {path.stem: yaml.safe_load(path.read_text()) for path in files}
    hosts |= yaml.safe_load((HOSTS / "faults.yaml").read_text())
    return hosts


WRITTEN = _load()


def _resolved(name: str) -> dict[str, Any]:
    own = dict(WRITTEN[name])
    like = own.pop("like", None)
    own.setdefault("expect", None)
    return _merged(_resolved(like), own) if like else own


@dataclass(frozen=True)
class Recorded:
    """A host from a file."""

    name: str
    data: Mapping[str, Any]

    @property
    def expect(self) -> Mapping[str, Any] | None:
        """What doctor must name first; None on a good host."""
        expected: Mapping[str, Any] | None = self.data["expect"]
        return expected

    def _command(self, words: Sequence[str]) -> str | None:
        line = " ".join(words)
        answers = self.data.get("commands") or {}
        return next((text for start, text in answers.items() if line.startswith(start)), None)

    def _write(self, root: Path) -> None:
        for name, text in self.data["files"].items():
            path = root / name.lstrip("/")
            if text == UNREADABLE:
                path.mkdir(parents=True)
            elif text is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{text}\n")

    def _probe(self) -> Probe:
        given = self.data["probe"]
        steps = {k: v for k, v in (given.get("steps") or {}).items() if v is not None}
        return Probe(**{**given, "steps": steps})

    def view(self, root: Path) -> HostView:
        """Write the files under a folder and look at them."""
        self._write(root)
        environ = {k: v for k, v in (self.data.get("environ") or {}).items() if v is not None}
        closed = {root / name.lstrip("/") for name in self.data.get("closed", ())}
        return HostView(
            root=root,
            environ=environ,
            command=self._command,
            package_version=self.data["packages"].get,
            can_open=lambda path: path not in closed,
            free_bytes=lambda path: self.data["free_gib"] * GIB,
            user=User("user", frozenset(self.data["groups"])),
            home="/home/user",
            prefix="/opt/venv",
            python=(3, 12),
            machine=self.data.get("machine", "x86_64"),
            probe=self._probe,
        )


RECORDED = [Recorded(name, _resolved(name)) for name in WRITTEN]
GOOD = [host for host in RECORDED if host.expect is None]
FAULTY = [host for host in RECORDED if host.expect is not None]
