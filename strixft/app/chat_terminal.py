"""A conversation in a terminal, with commands that begin with a slash."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from strixft.app.chat import Chat
from strixft.evaluate.variants import VARIANTS
from strixft.support.errors import RecipeError, StrixftError
from strixft.support.tables import did_you_mean
from strixft.support.text import visible

PROMPT = "> "


@dataclass
class Talk:
    """A conversation, and the variants that answer."""

    chat: Chat
    variants: tuple[str, ...]
    ended: bool = False

    def greeting(self, name: str) -> str:
        """Return the first lines."""
        return (
            f"{name}: {' and '.join(self.variants)} answer{'s' * (len(self.variants) == 1)}."
            " /help shows the commands, /quit ends."
        )


def _number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise RecipeError(f"{text!r} is not a number from {low:g} to {high:g}", fix="/help")
    return value


def _choose(*variants: str) -> Callable[[Talk, str], str]:
    def choose(talk: Talk, _: str) -> str:
        talk.variants = variants
        return f"{' and '.join(variants)} from now on; the conversation is kept"

    return choose


def _temperature(talk: Talk, text: str) -> str:
    if text:
        talk.chat.temperature = _number(text, 0, 2)
    return f"temperature {talk.chat.temperature:g}"


def _length(talk: Talk, text: str) -> str:
    if text:
        talk.chat.max_tokens = int(_number(text, 1, 32_768))
    return f"at most {talk.chat.max_tokens} tokens"


def _system(talk: Talk, text: str) -> str:
    talk.chat.system = text
    return "system text set" if text else "no system text"


def _reset(talk: Talk, _: str) -> str:
    talk.chat.reset()
    return "the conversation is forgotten"


def _quit(talk: Talk, _: str) -> str:
    talk.ended = True
    return ""


def _help(_: Talk, __: str) -> str:
    width = max(len(f"{name} {takes}") for name, (takes, _, _) in COMMANDS.items())
    rows = [
        f"  {f'{name} {takes}':<{width}}  {does}" for name, (takes, does, _) in COMMANDS.items()
    ]
    return "\n".join([*rows, "  Ctrl-C stops an answer, Ctrl-D ends the conversation"])


COMMANDS: dict[str, tuple[str, str, Callable[[Talk, str], str]]] = {
    "/tuned": ("", "the trained model answers", _choose("tuned")),
    "/base": ("", "the base model answers", _choose("base")),
    "/both": ("", "both answer, one after the other", _choose(*VARIANTS)),
    "/temperature": ("0.7", "0 takes the most likely token", _temperature),
    "/length": ("512", "most tokens of an answer", _length),
    "/system": ("TEXT", "system text; without TEXT: none", _system),
    "/reset": ("", "forget the conversation", _reset),
    "/help": ("", "show this", _help),
    "/quit": ("", "end", _quit),
}
"""Command → what it takes, what it does, and the function that returns what to print."""


def obey(talk: Talk, line: str) -> str:
    """Do what a command says, and return what to print.

    Raises:
        RecipeError: There is no such command, or its value is wrong.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise RecipeError(f"there is no command {name}", fix=did_you_mean(name, COMMANDS))
    return COMMANDS[name][2](talk, rest.strip())


def _lines(prompt: str) -> Iterator[str]:
    """Yield what is typed, with a prompt and line editing on a terminal."""
    if not prompt:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and keys
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt)


def converse(
    chat: Chat, name: str, variants: tuple[str, ...], write: Callable[[str], None]
) -> None:
    """Talk until the input ends. A pipe gets answers only, and its lines are no commands.

    Args:
        chat: The conversation.
        name: Name of the run.
        variants: Those that answer.
        write: Prints text as it is, at once.

    Raises:
        StrixftError: An answer failed and nobody is there to go on.
    """
    talk, on_terminal = Talk(chat, variants), sys.stdin.isatty()
    if on_terminal:
        write(f"{talk.greeting(name)}\n")
    for line in _lines(PROMPT if on_terminal else ""):
        if not (text := line.strip()):
            continue
        try:
            if on_terminal and text.startswith("/"):
                write("".join(f"{one}\n" for one in obey(talk, text).splitlines()))
            else:
                with _interrupts(chat.stop) if on_terminal else contextlib.nullcontext():
                    _answer(talk, text, write)
        except StrixftError as error:
            if not on_terminal:
                raise
            write(f"{error.problem}\nfix: {error.fix}\n")
        if talk.ended:
            return


@contextlib.contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call a function while a block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(talk: Talk, text: str, write: Callable[[str], None]) -> None:
    """Write the answers, each after its variant's name if there are several."""
    now = ""
    try:
        for variant, piece in talk.chat.ask(text, talk.variants):
            if variant != now and len(talk.variants) > 1:
                write(("\n" if now else "") + f"{variant}: ")
            now = variant
            write(visible(piece))
    finally:
        write("\n")
