"""What is wrong, or odd, with a chat before any template or tokenizer sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from strixft.formats import Chat, Message, RowFault

_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
"""Control characters, marks that turn the direction of writing, and byte-order marks in text."""
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


def texts_of(chat: Chat) -> list[str]:
    """Every text of a chat."""
    if chat.text is not None:
        return [chat.text]
    return [message["content"] for message in (*chat.messages, *(chat.rejected or ()))]


def _may_hide(text: str) -> bool:
    """Something may be hidden in a text; deleting bytes is much faster than a pattern."""
    if not text.isascii():
        return True
    plain = text.encode()
    return len(plain.translate(None, _CONTROLS)) < len(plain)


def oddities(chat: Chat, specials: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What somebody should know of a chat that is used all the same: a kind and a text.

    Args:
        chat: A checked chat.
        specials: Tokens that the template writes; in content they end or open turns.
    """
    for number, text in enumerate(texts_of(chat), start=1):
        if _may_hide(text) and (match := _HIDDEN.search(text)) is not None:
            where = f"message {number} has the hidden character U+{ord(match[0]):04X}"
            yield "hidden_characters", f"{where} at place {match.start()}"
        for special in specials:
            if special in text:
                yield "special_token", f"message {number} contains the token {special!r}"
