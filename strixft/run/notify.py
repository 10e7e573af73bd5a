"""Messages when a run is done, has failed or was stopped. One that cannot be sent ends no run."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.run.folder import Result, Run
from strixft.support.errors import Stopped, StrixftError
from strixft.support.progress import say
from strixft.support.text import redact
from strixft.support.units import format_seconds

TIMEOUT_S = 20.0
"""Longest time for one message."""


@dataclass(frozen=True, slots=True)
class Message:
    """The end of a run, for a person."""

    run: str
    state: str
    text: str

    @property
    def title(self) -> str:
        """One line."""
        return f"strixft: {self.run} {self.state}"


def _run(words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a program; its errors leave out its arguments, which may hold a secret."""
    try:
        status = subprocess.run(words, env=environment, timeout=TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        raise OSError(f"{words[0]} took longer than {TIMEOUT_S:.0f} s") from None
    if status:
        raise OSError(f"{words[0]} ended with exit code {status}")


def _post(url: str, **sent: Any) -> None:
    """Send to a server; the errors leave out its address, which is the secret of a webhook."""
    import httpx

    answer = httpx.post(url, timeout=TIMEOUT_S, **sent)
    if not answer.is_success:
        raise OSError(f"the server answered {answer.status_code} {answer.reason_phrase}".rstrip())


def _desktop(_: str, message: Message) -> None:
    program = shutil.which("notify-send")
    if program is None:
        raise OSError("there is no notify-send on this machine")
    _run([program, message.title, message.text])


def _ntfy(url: str, message: Message) -> None:
    title = message.title.encode("ascii", "replace").decode()
    _post(url, content=message.text.encode(), headers={"Title": title})


def _webhook(url: str, message: Message) -> None:
    both = f"{message.title}\n{message.text}"  # Slack and Mattermost read text, Discord content
    data = {"text": both, "content": both, "run": message.run, "state": message.state}
    _post(url, json=data)


def _command(words: str, message: Message) -> None:
    told = {"RUN": message.run, "STATE": message.state, "TEXT": message.text}
    _run(shlex.split(words), os.environ | {f"STRIXFT_{name}": text for name, text in told.items()})


WAYS: dict[str, Callable[[str, Message], None]] = {
    "desktop": _desktop,
    "ntfy": _ntfy,
    "webhook": _webhook,
    "command": _command,
}
"""Kind of a target, before its colon → sends to what follows the colon."""


def send(target: str, message: Message) -> None:
    """Send a message; a failure is a warning.

    Args:
        target: As in the recipe; `$NAME` in it is a variable of the environment.
        message: The message.
    """
    kind, _, place = target.partition(":")
    try:
        WAYS[kind](os.path.expandvars(place), message)
    except Exception as error:  # whatever a server, a program or the network does
        first = redact(str(error) or type(error).__name__).splitlines()[0]
        say(f"Warning: no message could be sent by {kind}: {first}")


def _text_of(run: Run) -> str:
    """Return the three figures of a finished run."""
    parts = []
    with contextlib.suppress(StrixftError):  # a damaged result
        if (trained := Result.load(run.stage_folder("train"))) is not None:
            parts.append(f"trained in {format_seconds(trained.figures['train_seconds'])}")
        if (evaluated := Result.load(run.stage_folder("evaluate"))) is not None:
            loss = evaluated.figures["metrics"]["loss"]
            parts.append(f"held-out loss {loss['base']:.3f} → {loss['tuned']:.3f}")
    return ", ".join(parts) or "finished"


@contextlib.contextmanager
def told(run: Run) -> Iterator[None]:
    """Tell those that the recipe names how a block ended."""
    targets, state = run.recipe.notify, "done"
    try:
        yield
    except BaseException as error:
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        for target in targets:
            send(target, Message(run.name, state, str(error) or type(error).__name__))
        raise
    for target in targets:
        send(target, Message(run.name, state, _text_of(run)))
