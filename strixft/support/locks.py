"""A lock with one owner at a time; it ends with its process and names that process.

The kernel drops the lock when the process ends, however it ends. The file names the owner by number
and start time, since the kernel reuses numbers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from strixft.support.errors import HostError, StageError
from strixft.support.text import typed

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_held: set[int] = set()
"""Open lock files of this process; a forked child does not hold them."""


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds a lock."""

    pid: int
    start: str | None
    """Boot of the machine and clock ticks since then: setting the clock does not change it."""
    host: str

    @property
    def is_here(self) -> bool:
        """Return whether it runs, or ran, on this machine."""
        return self.host == platform.node()

    @property
    def is_alive(self) -> bool:
        """Return whether it still runs; a process of another machine is taken to."""
        return not self.is_here or (self.start is not None and _start_of(self.pid) == self.start)


def _start_of(pid: int) -> str | None:
    """The start of a process; None if it does not exist or is a zombie."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def this_process() -> Owner:
    """Return this process as an owner."""
    return Owner(os.getpid(), _start_of(os.getpid()), platform.node())


def read_owner(path: Path) -> Owner | None:
    """Return the process that holds a lock, or was killed holding it; None if none is named."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = read_owner(path)  # a file system without locks: rely on the owner's name
        return owner is None or owner == this_process() or not owner.is_alive
    return True


def _busy(path: Path, what: str) -> StageError:
    owner = read_owner(path)
    if owner is None or not owner.is_here:
        where = f" on {owner.host}" if owner else ""
        return StageError(f"another process{where} is at work on {what}", fix="wait for it")
    if not owner.is_alive:
        return StageError(
            f"process {owner.pid} has ended, but a process that it started still holds {what}",
            fix=f"fuser -v {path}   shows which",
        )
    return StageError(
        f"process {owner.pid} is at work on {what}", fix=f"wait for it, or: strixft stop {what}"
    )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise HostError(
            f"{path.parent} cannot be written: {error.strerror}",
            fix=f"ls -ld {typed(path.parent)}   shows whose it is; or --run-dir and another folder",
        ) from error


@contextlib.contextmanager
def hold(path: Path, what: Path, patience_s: float) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: The file of the lock; it stays, and names the owner.
        what: The locked folder, for the error.
        patience_s: Seconds to wait for an owner that may be about to end.

    Raises:
        StageError: Another process holds it.
        HostError: The file cannot be created.
    """
    descriptor = _open(path)
    _held.add(descriptor)
    holds = False
    try:
        deadline = time.monotonic() + patience_s
        while not _try_lock(descriptor, path):
            if time.monotonic() > deadline:
                raise _busy(path, str(what))
            time.sleep(0.2)
        holds = True
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(this_process())).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not so in a forked child that ends here
            if holds:
                os.ftruncate(descriptor, 0)  # this process may live on and do something else
            _held.remove(descriptor)
            os.close(descriptor)
