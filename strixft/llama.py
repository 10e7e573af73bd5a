"""llama.cpp's own server in a process of its own, for a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from strixft.errors import HostError, StageError

LEFT_FREE = 1
"""Cores that llama.cpp leaves alone: its threads wait for each other without sleeping."""


def require_runtime() -> None:
    """Refuse where llama.cpp is not installed.

    Raises:
        HostError: The extra is missing.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise HostError(
            "llama.cpp's server is not installed, so the export cannot be tried",
            fix="pip install 'strixft[export]'",
        )


@contextlib.contextmanager
def served(model: Path, context_tokens: int) -> Iterator[str]:
    """The address of a server for a GGUF file; it ends with the block, or with this process.

    Args:
        model: The file.
        context_tokens: Longest prompt and answer.

    Raises:
        HostError: llama.cpp is not installed.
        StageError: The server does not start with this file.
    """
    require_runtime()
    command = [sys.executable, "-m", "strixft.llama", str(model), str(context_tokens)]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert child.stdout is not None
            address = next((line.strip() for line in child.stdout if line.startswith("http")), None)
            if address is None:
                log.seek(0)
                said = "\n  ".join(log.read().strip().splitlines()[-6:])
                raise StageError(
                    f"llama.cpp does not start with {model}:\n  {said}",
                    fix="a newer llama.cpp: pip install --upgrade xllamacpp",
                )
            yield address
        finally:
            child.communicate(timeout=30)  # closes its standard input: the server's word to end


def main() -> None:
    """Serve until standard input is closed."""
    import xllamacpp

    path, context_tokens = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = int(context_tokens)
    params.n_parallel = 1
    params.port = 0
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = max(1, len(os.sched_getaffinity(0)) - LEFT_FREE)
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
