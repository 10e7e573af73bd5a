"""Make text from outside safe to show: reveal hidden characters, leave out secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

_UNSEEN = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)

_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\b[rs]k_live_[A-Za-z0-9]{20,}"  # model servers, Stripe
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bAIza[\w-]{35}"  # Google
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # JSON web tokens
)

_MARKS = (
    *("sk-", "hf_", "eyJ", "AKIA", "ASIA", "AIza", "xox", "k_live_", "PRIVATE KEY"),
    *("github_pat_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
)
"""Each match of `_KEY` contains one of these; searching for them first is much faster."""

_ASSIGNED = re.compile(
    r"(?i)\b(?:api[_-]?key|secret[_-]?key|access[_-]?token|auth[_-]?token|passw(?:or)?d)"
    r"""["']?\s*[:=]\s*["']?(?=[^\s"']*\d)[A-Za-z0-9+/_.\-]{12,}"""
)

_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:token|api_?key|access_?key|secret|secret_?key|passw(?:or)?d|credentials?)$"
)

OWN_KEY = "STRIXFT_API_KEY"
"""Variable with the key for model servers: a secret even if it consists of words."""

_SHORTEST_SECRET = 8

_LONGEST_WORDS = 20
"""Words of this length in all are a pass phrase: no text contains it by chance."""

_FEWEST_CHARACTERS = 6
"""Least number of different characters in a secret."""

_PAIRS = (
    " ab ac ad ag ai al am an ap ar as at ay ba be bl bo ca ce ch ck co ct da de di do ds ea ec"
    " ed ee el em en ep er es et ev ex fi fo ge gh ha he hi ho ic id ie ig il im in io ir is it"
    " iz ke ks la le li ll lo ma me mi mo mp na nc nd ne ng ni no ns nt oc od ol om on oo op or"
    " os ot ou ow pa pe pl po pr qu ra rd re ri ro rs rt se sh si so ss st su ta tc te th ti to"
    " tr ts tt tu ul un ur us ut va ve wa we ze "
)
"""Pairs of letters in English words; of random pairs a fifth is among them."""

_LETTERS = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{3,}")

SECRET = "[secret]"


def visible(text: str) -> str:
    r"""Show control characters and changes of direction in a text by their numbers.

    >>> visible("a\u202eb")
    'a⟦U+202E⟧b'
    """
    return _UNSEEN.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text)


def find_keys(text: str) -> Iterator[re.Match[str]]:
    """Yield the matches of likely keys and passwords in a text."""
    if any(mark in text for mark in _MARKS):
        yield from _KEY.finditer(text)
    lower = text.lower()
    if "passw" in lower or "token" in lower or "key" in lower:
        yield from _ASSIGNED.finditer(text)


def _is_word(letters: str) -> bool:
    low = letters.lower()
    pairs = [f" {low[i : i + 2]} " in _PAIRS for i in range(len(low) - 1)]
    return sum(pairs) > 0.5 * len(pairs)


def _looks_random(value: str) -> bool:
    """Return whether a value is too long or too irregular to occur in a text by chance.

    >>> _looks_random("training"), _looks_random("password123"), _looks_random("k7Qz-p0Wv-x3Lt")
    (False, False, True)
    """
    if len(set(value)) < _FEWEST_CHARACTERS or value.isdigit():
        return False
    words = sum(len(run) for run in _LETTERS.findall(value) if _is_word(run))
    return len(value) >= _LONGEST_WORDS or words < 0.7 * sum(map(str.isalnum, value))


def _own_secrets() -> list[str]:
    """Return the values of this environment that are secret by name and not mere words."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name)
        and len(value) >= _SHORTEST_SECRET
        and value[0] not in "/~"
        and (name == OWN_KEY or _looks_random(value))
    }
    return sorted(found, key=len, reverse=True)


def typed(path: object) -> str:
    """Quote a path for a shell.

    >>> typed("my runs/a")
    "'my runs/a'"
    """
    return shlex.quote(str(path))


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name holds a token or a password."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """Remove this environment's tokens, and anything that looks like a key, from a text.

    >>> redact("Authorization: hf_" + "a1" * 17)
    'Authorization: [secret]'
    """
    for secret in _own_secrets():
        text = text.replace(secret, SECRET)
    for match in reversed(list(find_keys(text))):
        text = f"{text[: match.start()]}{SECRET}{text[match.end() :]}"
    return text


def redact_all(data: Any) -> Any:
    """Redact every text in JSON-like data."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, dict):
        return {key: redact_all(value) for key, value in data.items()}
    return [redact_all(value) for value in data] if isinstance(data, list | tuple) else data
