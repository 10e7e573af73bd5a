"""Text that looks like a key, an e-mail address or a phone number: found, shown masked.

These are patterns, not proofs: they find what is written in the usual way, and now and then a
number that is no phone number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from strixft.formats import Chat, Message
from strixft.text import find_keys

_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_NOBODY = re.compile(r"(?i)@(?:[\w.-]*\.)?example\.(?:com|net|org)$|\.(?:example|invalid|test)$")
"""Domains that belong to nobody (RFC 2606)."""
_PHONE = re.compile(
    r"(?<![\w+.])\+\d[\d ().-]{6,17}\d(?!\w)"
    r"|(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    r"|(?<![\w./-])0\d{2,4}[ /-]\d{5,9}(?![\w/-])"
)
_DIGITS = re.compile(r"(?<!\w)\d[\d ().+/-]{6,}\d")
"""Where a phone number may stand; most texts have no such place."""


def _emails(text: str) -> Iterator[re.Match[str]]:
    if "@" in text:
        yield from (m for m in _EMAIL.finditer(text) if not _NOBODY.search(m[0]))


def _phones(text: str) -> Iterator[re.Match[str]]:
    plain = text.encode("utf-8", "replace")
    if len(plain) - len(plain.translate(None, b"0123456789")) < 8:  # much faster than a pattern
        return
    for run in _DIGITS.finditer(text):
        # a plus or a bracket may stand before the digits, and what follows them matters
        for match in _PHONE.finditer(text, max(0, run.start() - 2), run.end() + 1):
            if 8 <= sum(character.isdigit() for character in match[0]) <= 15:
                yield match


KINDS = {"secret": find_keys, "email": _emails, "phone": _phones}
NAMES = {"secret": "a key", "email": "an e-mail address", "phone": "a phone number"}


def masked(text: str) -> str:
    """What was found, as it may be shown: its start and its length.

    >>> masked("anna@mail.org")
    'an… (13 characters)'
    """
    return f"{text[:2]}… ({len(text)} characters)"


def find(text: str) -> list[tuple[str, str]]:
    """What looks personal in a text: kind, and how it may be shown."""
    return [(kind, masked(match[0])) for kind, seek in KINDS.items() for match in seek(text)]


def mask_text(text: str) -> str:
    """The text with `[secret]`, `[email]` and `[phone]` in place of what was found.

    >>> mask_text("Write to anna@mail.org.")
    'Write to [email].'
    """
    for kind, seek in KINDS.items():
        for match in reversed(list(seek(text))):
            text = f"{text[: match.start()]}[{kind}]{text[match.end() :]}"
    return text


def _mask_value(value: Any) -> Any:
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, dict):
        return {key: _mask_value(inner) for key, inner in value.items()}
    return [_mask_value(inner) for inner in value] if isinstance(value, list) else value


def _mask_messages(messages: list[Message]) -> list[Message]:
    kept = ("role", "train", "tool_call_id", "name")
    return [{k: v if k in kept else _mask_value(v) for k, v in m.items()} for m in messages]


def mask_chat(chat: Chat) -> Chat:
    """A chat with what looks personal masked, in calls too."""
    return replace(
        chat,
        messages=_mask_messages(chat.messages),
        rejected=None if chat.rejected is None else _mask_messages(chat.rejected),
        text=None if chat.text is None else mask_text(chat.text),
    )
