"""A desktop that goes to sleep would stop a run over night."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator

COMMAND = ("--what=sleep:idle", "--who=strixft", "--why=training a model", "--mode=block", "cat")
"""`cat` ends when this process does, however it ends, and the lock with it."""
REFUSED_S = 0.2


@contextlib.contextmanager
def awake() -> Iterator[bool]:
    """Keep the machine awake while a block runs, where systemd is there.

    Yields:
        Whether it is kept awake.
    """
    program = shutil.which("systemd-inhibit")
    if program is None:
        yield False
        return
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        [program, *COMMAND],
        stdin=subprocess.PIPE,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    ) as process:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REFUSED_S)  # it ends at once where no systemd answers
            yield process.poll() is None
        finally:
            process.terminate()
