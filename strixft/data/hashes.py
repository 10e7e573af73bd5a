"""What a row says, as a number: for duplicates, for the split, and for leaks across it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from strixft.formats import Chat, Message

Hashes = npt.NDArray[np.uint64]


def hash_text(text: str) -> int:
    """64 bits of a text; two of a million different texts agree once in 37 million such sets."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _parts(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        yield message["role"]
        yield message["content"]
        if message.get("train") is False:
            yield "not trained"
        if message.get("name"):
            yield message["name"]
        if "tool_calls" in message:
            yield json.dumps([call["function"] for call in message["tool_calls"]])


def content_hash(chat: Chat) -> int:
    """Of all that a row says; of nothing that a template, a tokenizer or a file adds."""
    parts = [chat.text] if chat.text is not None else list(_parts(chat.messages))
    if chat.tools:
        parts.append(json.dumps(chat.tools))
    if chat.rejected is not None:
        parts += _parts(chat.rejected)
    if chat.label is not None:
        parts.append(str(chat.label))
    return hash_text("\x1f".join(parts))


def question_hash(chat: Chat) -> int:
    """Of what stands before the last answer, case and spaces aside; of plain text, all of it."""
    if chat.text is not None:
        asked = chat.text
    else:
        last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
        asked = "\x1f".join(message["content"] for message in chat.messages[:last])
    return hash_text(" ".join(asked.casefold().split()))


def uniform(hashes: Hashes, salt: int = 0) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1); another salt gives numbers that have nothing to do with them.

    The mixing is splitmix64's (Steele, Lea and Flood, OOPSLA 2014).
    """
    if salt:
        with np.errstate(over="ignore"):
            hashes = hashes + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
            hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            hashes = hashes ^ (hashes >> np.uint64(31))
    mixed: npt.NDArray[np.float64] = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return mixed
