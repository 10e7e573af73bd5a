"""llama.cpp's own server for a GGUF file, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from strixft.support.errors import HostError, StageError

START_S = 900.0
"""Longest wait for a server that loads its model."""

ENDS_S = 10.0
"""Longest wait for a server that should end."""

ANY_TEMPLATE = "chatml"
"""A template of llama.cpp's own, for a file whose template it cannot express."""

_REFUSED = "chat template parsing error"

_UNFIT = "error loading model: "
"""Before llama.cpp's reason why a file is not a model that it knows."""

LEFT_FREE = 1
"""Cores that llama.cpp leaves alone: its threads wait for each other without sleeping."""

NEWER = "a newer llama.cpp: pip install --upgrade xllamacpp"


class TemplateError(StageError):
    """llama.cpp cannot express the chat template in a file."""


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
def served(
    model: Path, context_tokens: int, adapter: Path | None = None, chat_template: str = ""
) -> Iterator[str]:
    """Give the address of a server that ends with the block, or with this process.

    Args:
        model: GGUF file.
        context_tokens: Longest prompt and answer together.
        adapter: GGUF file of an adapter to put on the model.
        chat_template: Name of one of llama.cpp's own; the file's if empty.

    Raises:
        HostError: llama.cpp is not installed.
        TemplateError: It cannot express the file's chat template; the problem says why.
        StageError: The server does not start with this file, hangs, or ends within the block.
    """
    require_runtime()
    command = [sys.executable, "-m", "strixft.servers.llama_cpp", str(model), str(context_tokens)]
    command += [chat_template, *([str(adapter)] if adapter else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, stderr=log, **pipes)  # type: ignore[call-overload]
        try:
            yield _address(child, log, model)
        except HostError as error:  # of a request within the block
            raise _failure(child, log, model, error) from error
        finally:
            try:
                child.communicate(timeout=ENDS_S)  # closes its standard input: its word to end
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()


def _address(child: subprocess.Popen[str], log: IO[str], model: Path) -> str:
    assert child.stdout is not None
    hangs = threading.Timer(START_S, child.kill)
    hangs.start()
    address = next((line.strip() for line in child.stdout if line.startswith("http")), None)
    late = not hangs.is_alive()
    hangs.cancel()
    if address is not None:
        return address
    lines = _lines(log)
    if any(_REFUSED in line for line in lines):
        why = next((line for line in lines if line.startswith("Error: ")), _REFUSED)
        raise TemplateError(
            why.removeprefix("Error: "), fix="llama-server --chat-template-file FILE"
        )
    for line in lines:
        if _UNFIT in line:
            reason = line.partition(_UNFIT)[2]
            raise StageError(f"llama.cpp cannot load {model.name}: {reason}", fix=NEWER)
    when = f" within {START_S:.0f} s" if late else ""
    raise StageError(f"llama.cpp does not start with {model}{when}:{_last(lines)}", fix=NEWER)


def _failure(
    child: subprocess.Popen[str], log: IO[str], model: Path, error: HostError
) -> StageError:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(ENDS_S)  # a connection breaks a moment before its process is gone
    if child.returncode is None:
        problem = f"llama.cpp's server hangs with {model}: {error.problem}"
    else:
        how = f"exit code {child.returncode}" if child.returncode >= 0 else "killed"
        problem = f"llama.cpp's server ended with {model} ({how}):{_last(_lines(log))}"
    again = "close other programs, then run the same command again"
    return StageError(problem, fix=f"{again}; or {NEWER}")


def _lines(log: IO[str]) -> list[str]:
    log.seek(0)
    return log.read().strip().splitlines()


def _last(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines[-6:])


def main() -> None:
    """Serve until standard input is closed."""
    import xllamacpp

    path, context_tokens, template, *adapters = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = int(context_tokens)
    params.n_parallel = 1
    params.chat_template = template
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in adapters]
    params.port = 0
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = max(1, len(os.sched_getaffinity(0)) - LEFT_FREE)
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
