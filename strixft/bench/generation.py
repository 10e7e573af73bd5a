"""`Generation`: one prompt read and one answer made, in the terms of `ollama run --verbose`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from strixft.bench.result import Row
from strixft.bench.timing import Sample
from strixft.bench.weights import FLOP_PER_TOKEN, Ceiling, compute_ceiling, decode_ceiling, judge
from strixft.catalog.hosts import Host
from strixft.support.errors import HostError

TOLERANCE = 0.02
"""By how much a server's rate may differ from its own count ÷ duration."""

SHORT_PROMPT = 64
"""Tokens below which a prompt's rate is the start of a request rather than a speed."""


WORDS: tuple[str, ...] = ("river", "table", "window", "garden", "engine", "paper", "market")

WORDS += ("winter", "summer", "doctor", "letter", "number", "planet", "animal", "island", "bridge")

WORDS += ("kitchen", "forest", "mountain", "station", "village", "castle", "picture", "music")
"""Words that are one token in usual vocabularies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one request took; seconds and tokens."""

    load_s: float | None
    prompt_tokens: int
    prompt_s: float
    """Reading the prompt; of a server without counters, until the first token came."""
    tokens: int
    decoded: int
    """Tokens made in `decode_s`: without the first, where that came with the prompt."""
    decode_s: float
    total_s: float
    first_token_s: float
    """TTFT: from the request to its first token, by the client's clock."""
    clock: str
    """Whose clock `prompt_s` and `decode_s` are of: `server` or `client`."""
    client_decode_s: float | None = None
    """Decoding by the client's clock, beside a server's counters."""

    @property
    def prompt_tok_per_s(self) -> float:
        """Prefill."""
        return self.prompt_tokens / self.prompt_s

    @property
    def tok_per_s(self) -> float:
        """Decode."""
        return self.decoded / self.decode_s

    @property
    def client_tok_per_s(self) -> float | None:
        """Decode by the client's clock."""
        if self.client_decode_s is None:
            return None
        return (self.tokens - 1) / self.client_decode_s


def check_counters(who: str, what: str, count: int, seconds: float, rate: float | None) -> int:
    """Refuse counters that contradict each other: rate × duration has to be the count.

    Returns:
        Tokens that the duration is of: all, or one less where the first came with the prompt.

    Raises:
        HostError: They do, or they count nothing.
    """
    if count <= 0 or seconds <= 0:
        raise HostError(
            f"{who} counts {count} tokens in {seconds:g} s for {what}",
            fix="update the server; or ask for more tokens: --new-tokens 128",
        )
    if rate is None:
        return count
    counted = min((count, count - 1), key=lambda tokens: abs(rate * seconds - tokens))
    if abs(rate * seconds - counted) <= TOLERANCE * counted:
        return counted
    raise HostError(
        f"{who} contradicts itself on {what}: {count} tokens in {seconds:.4g} s are"
        f" {count / seconds:.4g} tokens/s, and it says {rate:.4g}",
        fix="update the server; no figure of it is kept",
    )


def require_tokens(who: str, generation: Generation, asked: int) -> Generation:
    """Refuse an answer that is too short to tell a speed.

    Raises:
        HostError: Fewer than half of the tokens came.
    """
    if generation.tokens < min(asked, max(2, asked // 2)):
        raise HostError(
            f"{who} stopped after {generation.tokens} of {asked} tokens",
            fix="is its context long enough? else a base model, or --new-tokens with fewer",
        )
    return generation


def prompt_text(tokens: int) -> str:
    """About so many tokens of text, never the same: no part of it is in a server's cache."""
    return " ".join(random.choices(WORDS, k=max(1, tokens)))


class Backend(Protocol):
    """Something that generates."""

    @property
    def host(self) -> Host | None:
        """Where it runs, if that is known."""

    @property
    def label(self) -> dict[str, Any]:
        """The first columns of its rows: `backend`, `model`, `variant`, `server`."""

    @property
    def read_parameters(self) -> float | None:
        """Parameters that take part in a token, if that is known."""

    def bytes_per_token(self, depth: int) -> float | None:
        """Bytes read for a token with so many in the cache, if that is known."""

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Read a prompt of about so many tokens, and make an answer of so many."""


def repeat_generation(
    backend: Backend, prompt_tokens: int, new_tokens: int, repeat: int
) -> list[Generation]:
    """Warm up once, then measure; each with a prompt of its own."""
    backend.generate(prompt_tokens, min(new_tokens, 8), 0)
    return [backend.generate(prompt_tokens, new_tokens, seed) for seed in range(1, repeat + 1)]


def sample(generations: Iterable[Generation], of: Callable[[Generation], float]) -> Sample:
    """One figure of some generations."""
    return Sample(tuple(of(generation) for generation in generations))


def rate_columns(found: Sample) -> Row:
    """The columns that every rate has."""
    return {"tok_per_s": found.median, "spread": found.spread, "repeats": len(found.values)}


def decode_roof(backend: Backend, depth: int, tok_per_s: float) -> Row:
    """Columns of generating against the memory; unknowns are None."""
    read = backend.bytes_per_token(depth)
    ceiling = decode_ceiling(backend.host, read) if backend.host and read else None
    return {"gb_per_token": read and read / 1e9, **_columns(ceiling, tok_per_s)}


def prefill_roof(backend: Backend, tok_per_s: float) -> Row:
    """Columns of reading prompts against the matrix units; unknowns are None."""
    host, read = backend.host, backend.read_parameters
    flop = FLOP_PER_TOKEN["forward"]
    ceiling = compute_ceiling(host, read, flop) if host and read else None
    return _columns(ceiling, tok_per_s)


def _columns(ceiling: Ceiling | None, tok_per_s: float) -> Row:
    if ceiling is None:
        return dict.fromkeys(("ceiling_tok_per_s", "share", "verdict"))
    return {
        "ceiling_tok_per_s": ceiling.tok_per_s,
        "share": ceiling.share(tok_per_s),
        "verdict": judge(tok_per_s, ceiling),
    }
