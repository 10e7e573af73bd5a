"""What is wrong, or odd, with a chat before any template or tokenizer sees it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from strixft.formats import Chat, Message, RowFault

_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
"""Control characters, marks that turn the direction of writing, and byte-order marks in text."""
_PLACEHOLDER = re.compile(r"<(?:image|audio|video)>")
"""What LLaVA's data and others write where a picture or a sound belongs."""
_CONTROLS = bytes(code for code in (*range(32), 127) if code not in b"\t\n\r")


def _check_turns(messages: Sequence[Message]) -> None:
    before: Message | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role in ("user", "assistant"):
            if not message["content"].strip() and "tool_calls" not in message:
                raise RowFault("empty_turn", f"message {number}, the {role}'s, is empty")
            if before is not None and before["role"] == role:
                raise RowFault(
                    "same_role_twice", f"messages {number - 1} and {number} are both the {role}'s"
                )
        before = message


def _check_answer(messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowFault("no_answer", "no message is the assistant's, so there is nothing to train")
    if not any(message.get("train", True) for message in answers):
        raise RowFault("nothing_to_train", "every answer is marked as not to be trained")


def check_chat(chat: Chat) -> None:
    """Refuse a chat that cannot be trained on.

    Raises:
        RowFault: A turn is empty, a role speaks twice in a row, or no answer is to be trained.
    """
    if chat.text is not None:
        return
    for messages in (chat.messages, chat.rejected):
        if messages is not None:
            _check_turns(messages)
            _check_answer(messages)


def _words(value: object) -> Iterator[str]:
    """Every text in a JSON value, names of its keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _said(message: Message) -> list[str]:
    """Every text of a message: its content, and the arguments of its calls."""
    calls = message.get("tool_calls", ())
    return [message["content"], *(w for c in calls for w in _words(c["function"]["arguments"]))]


def texts_of(chat: Chat) -> list[str]:
    """Every text of a chat."""
    if chat.text is not None:
        return [chat.text]
    return [text for message in (*chat.messages, *(chat.rejected or ())) for text in _said(message)]


def _may_hide(text: str) -> bool:
    """Something may be hidden in a text; deleting bytes is much faster than a pattern."""
    if not text.isascii():
        return True
    plain = text.encode()
    return len(plain.translate(None, _CONTROLS)) < len(plain)


def any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds tokens in a text, the longest first; None without any.

    Tags of reasoning are left out: answers hold them rightly.
    """
    longest = sorted(set(tokens) - {"", "<think>", "</think>"}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _nulls(value: object, path: str = "") -> Iterator[str]:
    """Paths to the nulls in a JSON value."""
    if value is None:
        yield path
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _nulls(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _nulls(inner, path)


def _null(functions: Iterable[Message], part: str, where: str) -> Iterator[tuple[str, str]]:
    for function in (one["function"] for one in functions):
        for path in _nulls(function.get(part)):
            yield "null", f"{where} {function['name']} with null for {path!r}"
            return


def oddities(chat: Chat, specials: re.Pattern[str] | None) -> Iterator[tuple[str, str]]:
    """What somebody should know of a chat that is used all the same: a kind and a text.

    Args:
        chat: A checked chat.
        specials: Finds tokens that the tokenizer does not read as text.
    """
    plain: list[Message] = [{"role": "text", "content": chat.text or ""}] * (chat.text is not None)
    for number, message in enumerate([*plain, *chat.messages, *(chat.rejected or ())], start=1):
        for text in _said(message):
            if _may_hide(text) and (match := _HIDDEN.search(text)) is not None:
                where = f"message {number} has the hidden character U+{ord(match[0]):04X}"
                yield "hidden_characters", f"{where} at place {match.start()}"
            for special in sorted(set(specials.findall(text))) if specials else ():
                yield "special_token", f"message {number} contains the token {special!r}"
            if (match := _PLACEHOLDER.search(text)) is not None:
                yield "placeholder", f"message {number} has {match[0]!r}, and only text is trained"
        if message["role"] != "assistant" and message.get("train"):
            role = message["role"]
            yield "flag_unused", f"message {number}, the {role}'s, asks to be trained"
        yield from _null(message.get("tool_calls", ()), "arguments", f"message {number} calls")
    yield from _null(chat.tools or (), "parameters", "the tools have")
