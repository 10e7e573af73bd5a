"""Commands on a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence


def at_a_terminal(words: list[str], lines: Sequence[str] = (), columns: int = 80) -> str:
    """What a command shows on a real terminal where these lines are typed, one for each prompt."""
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["TERM"] = "xterm-256color"
    command = [sys.executable, "-m", "strixft", *words]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env=environment,
    )
    os.close(terminal)
    shown, left = "", list(lines)
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(main_end, 65536):
            shown += piece.decode(errors="replace")
            if left and shown.endswith("> "):
                os.write(main_end, f"{left.pop(0)}\n".encode())
    os.close(main_end)
    process.wait(60)
    return shown
