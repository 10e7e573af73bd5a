"""`Generation`: one prompt read and one answer made, in the terms of `ollama run --verbose`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

from strixft.catalog.hosts import Host
from strixft.support.errors import HostError

TOLERANCE = 0.02
"""Largest difference between a server's rate and its own count ÷ duration, as a fraction."""

WORDS = (
    "river table window garden engine paper market winter summer doctor letter number planet"
    " animal island bridge kitchen forest mountain station village castle picture music"
)
"""Words that are one token each in usual vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Times (seconds) and counts (tokens) of one request."""

    load_s: float | None
    prompt_tokens: int
    prompt_s: float
    """Reading the prompt; without a server's counters, the time to the first token."""
    tokens: int
    decoded: int
    """Tokens made in `decode_s`: one less than `tokens` if the first came with the prompt."""
    decode_s: float
    total_s: float
    first_token_s: float
    """TTFT: from the request to its first token, by the client's clock."""
    clock: str
    """Source of `prompt_s` and `decode_s`: `server` or `client`."""
    client_decode_s: float | None = None
    """Decoding by the client's clock, beside a server's counters."""

    @property
    def prompt_tok_per_s(self) -> float:
        """Prefill rate."""
        return self.prompt_tokens / self.prompt_s

    @property
    def tok_per_s(self) -> float:
        """Decoding rate."""
        return self.decoded / self.decode_s

    @property
    def client_tok_per_s(self) -> float | None:
        """Decoding rate by the client's clock."""
        return self.client_decode_s and (self.tokens - 1) / self.client_decode_s


class Backend(Protocol):
    """Something that generates."""

    @property
    def host(self) -> Host | None:
        """The machine it runs on, if known."""

    @property
    def label(self) -> dict[str, Any]:
        """The first columns of its rows: `backend`, `model`, `variant`, `server`."""

    @property
    def read_parameters(self) -> float | None:
        """Parameters used for one token, if known."""

    def bytes_per_token(self, depth: int) -> float | None:
        """Return the bytes read for one token behind `depth` tokens in the cache, if known."""

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Read a prompt of about so many tokens, and make an answer of so many."""


def prompt_text(tokens: int) -> str:
    """Return text of about so many tokens, new each time so that no server has it cached."""
    return " ".join(random.choices(WORDS.split(), k=max(1, tokens)))


def check_counters(url: str, what: str, count: int, seconds: float, rate: float | None) -> int:
    """Check that a server's counters do not contradict each other: rate × duration = count.

    Returns:
        The tokens made in the duration: all, or one less if the first came before it.

    Raises:
        HostError: They contradict each other or count nothing.
    """
    if count <= 0 or seconds <= 0:
        raise HostError(
            f"{url} counts {count} tokens in {seconds:g} s for {what}",
            fix="update the server; or ask for more tokens: --new-tokens 128",
        )
    if rate is None:
        return count
    counted = min((count, count - 1), key=lambda tokens: abs(rate * seconds - tokens))
    if abs(rate * seconds - counted) <= TOLERANCE * counted:
        return counted
    raise HostError(
        f"{url} contradicts itself on {what}: {count} tokens in {seconds:.4g} s are"
        f" {count / seconds:.4g} tokens/s, and it says {rate:.4g}",
        fix="update the server; no figure of it is kept",
    )
