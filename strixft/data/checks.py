"""Check chats before any template or tokenizer sees them: faults, oddities, personal data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.support.text import find_keys

_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
"""Control characters, marks that turn the direction of writing, and byte-order marks."""

_PLACEHOLDER = re.compile(r"<(?:image|audio|video)>")
"""Texts in place of a picture or a sound, as LLaVA's data and others have them."""

_CONTROLS = bytes(code for code in (*range(32), 127) if code not in b"\t\n\r")


def check_chat(chat: Chat) -> None:
    """Refuse a chat that cannot be trained on.

    Raises:
        RowFault: A turn is empty, a role speaks twice in a row, or no answer is to be trained.
    """
    if chat.text is not None:
        return
    for messages in (one for one in (chat.messages, chat.rejected) if one is not None):
        before, answers = "", []
        for number, message in enumerate(messages, start=1):
            role = message["role"]
            if role in ("user", "assistant"):
                if not message["content"].strip() and "tool_calls" not in message:
                    raise RowFault("empty_turn", f"message {number}, the {role}'s, is empty")
                if before == role:
                    both = f"messages {number - 1} and {number} are both the {role}'s"
                    raise RowFault("same_role_twice", both)
            answers += [message] if role == "assistant" else []
            before = role
        if not answers:
            none = "no message is the assistant's, so there is nothing to train"
            raise RowFault("no_answer", none)
        if not any(message.get("train", True) for message in answers):
            raise RowFault("nothing_to_train", "every answer is marked as not to be trained")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values in a JSON value, each with the dotted path of keys to it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def _said(message: Message) -> list[str]:
    """Return the content of a message, and the texts in the arguments of its calls."""
    leaves = (_leaves(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
    return [message["content"], *(one for of in leaves for _, one in of if isinstance(one, str))]


def texts_of(chat: Chat) -> list[str]:
    """Return every text of a chat."""
    if chat.text is not None:
        return [chat.text]
    return [text for message in (*chat.messages, *(chat.rejected or ())) for text in _said(message)]


def _may_hide(text: str) -> bool:
    if not text.isascii():
        return True
    plain = text.encode()  # deleting bytes is much faster than a pattern
    return len(plain.translate(None, _CONTROLS)) < len(plain)


def any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds tokens in a text, the longest first; None without any.

    Tags of reasoning are left out: answers hold them rightly.
    """
    longest = sorted(set(tokens) - {"", "<think>", "</think>"}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _null(functions: Iterable[Message], part: str, where: str) -> Iterator[tuple[str, str]]:
    for function in (one["function"] for one in functions):
        nulls = (path for path, value in _leaves(function.get(part, {})) if value is None)
        if (path := next(nulls, None)) is not None:
            yield "null", f"{where} {function['name']} with null for {path!r}"
            return


def oddities(chat: Chat, specials: re.Pattern[str] | None) -> Iterator[tuple[str, str]]:
    """Yield oddities of a chat that is used all the same: a kind and a text each."""
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


_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")

_NOBODY = re.compile(r"(?i)@(?:[\w.-]*\.)?example\.(?:com|net|org)$|\.(?:example|invalid|test)$")
"""Domains that belong to nobody (RFC 2606)."""

_PHONE = re.compile(
    r"(?<![\w+.])\+\d[\d ().-]{6,17}\d(?!\w)"
    r"|(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"
    r"|(?<![\w./-])0\d{2,4}[ /-]\d{5,9}(?![\w/-])"
)

_DIGITS = re.compile(r"(?<!\w)\d[\d ().+/-]{6,}\d")
"""Places where a phone number may stand; most texts have none."""


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


_FINDERS = {"secret": find_keys, "email": _emails, "phone": _phones}

NAMES = {"secret": "a key", "email": "an e-mail address", "phone": "a phone number"}


def find(text: str) -> list[tuple[str, str]]:
    """Return what looks personal in a text: kind, and form in which it may be shown.

    >>> find("Write to anna@mail.org.")
    [('email', 'an… (13 characters)')]
    """
    found = ((kind, match[0]) for kind, seek in _FINDERS.items() for match in seek(text))
    return [(kind, f"{said[:2]}… ({len(said)} characters)") for kind, said in found]


def mask_text(text: str) -> str:
    """Return the text with `[secret]`, `[email]` and `[phone]` in place of personal data.

    >>> mask_text("Write to anna@mail.org.")
    'Write to [email].'
    """
    for kind, seek in _FINDERS.items():
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
    """Return a chat whose personal data are masked, in calls too."""
    return replace(
        chat,
        messages=_mask_messages(chat.messages),
        rejected=None if chat.rejected is None else _mask_messages(chat.rejected),
        text=None if chat.text is None else mask_text(chat.text),
    )
