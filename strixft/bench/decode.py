"""Generating: tokens per second, llama-bench's `tg`, from an empty cache and behind a prompt."""

from __future__ import annotations

from typing import Any

from strixft.bench.generation import (
    Backend,
    Generation,
    decode_roof,
    rate_columns,
    repeat_generation,
    sample,
)
from strixft.bench.result import Row
from strixft.bench.subject import Subject
from strixft.bench.timing import Sample, take_turns
from strixft.support.errors import RecipeError

SHORTEST = 4
"""Tokens of the prompt where the cache should be empty: enough words to be new to the server."""

LEAST_NEW = 16


def _counters(found: list[Generation]) -> Row:
    """The figures of `ollama run --verbose`, medians of all repeats."""
    of: dict[str, Any] = {
        "first_token_s": lambda one: one.first_token_s,
        "prompt_s": lambda one: one.prompt_s,
        "prompt_tok_per_s": lambda one: one.prompt_tok_per_s,
        "decode_s": lambda one: one.decode_s,
        "total_s": lambda one: one.total_s,
    }
    return {name: sample(found, figure).median for name, figure in of.items()}


def _beside(found: list[Generation], rate: Sample) -> Row:
    """The client's clock beside a server's counters."""
    rates = [one.client_tok_per_s for one in found]
    if None in rates:
        return {"client_tok_per_s": None, "off": None}
    client = Sample(tuple(rate for rate in rates if rate is not None)).median
    return {"client_tok_per_s": client, "off": client / rate.median - 1}


def _row(backend: Backend, depth: int, new_tokens: int, repeat: int) -> Row:
    found = repeat_generation(backend, depth or SHORTEST, new_tokens, repeat)
    rate = sample(found, lambda one: one.tok_per_s)
    return {
        **backend.label,
        "test": f"tg{new_tokens}" + (f"@d{depth}" if depth else ""),
        **rate_columns(rate),
        "seconds_per_token": 1 / rate.median,
        "prompt_tokens": found[0].prompt_tokens,
        "tokens": found[0].tokens,
        "load_s": found[0].load_s,
        **_counters(found),
        **decode_roof(backend, found[0].prompt_tokens + new_tokens // 2, rate.median),
        "clock": found[0].clock,
        **_beside(found, rate),
    }


def _check_row(backend: Backend, new_tokens: int, repeat: int) -> Row:
    """Our loop and a bare one in turns: what the harness costs."""
    from strixft.bench.in_process import Loaded, bare_seconds

    if not isinstance(backend, Loaded):
        raise RecipeError("--check is for models in process", fix="drop --check, or --server")
    backend.generate(SHORTEST, new_tokens, 0)

    def ours() -> float:
        return backend.generate(SHORTEST, new_tokens, 1).total_s

    def bare() -> float:
        return bare_seconds(backend.model, backend.prompt(SHORTEST, 1), new_tokens)

    times = take_turns({"ours": ours, "bare": bare}, repeat)
    rate, direct = (times[name].per(new_tokens) for name in ("ours", "bare"))
    return {
        **backend.label,
        "test": f"tg{new_tokens}, prompt included",
        **rate_columns(rate),
        "direct_tok_per_s": direct.median,
        "off": rate.beside(direct),
    }


def bench_decode(
    new_tokens: int = 128,
    depth: int = 512,
    repeat: int = 5,
    check: bool = False,
    subject: Subject | None = None,
) -> list[Row]:
    """Time how tokens are made.

    Args:
        new_tokens: Of each answer.
        depth: Tokens of the prompt in a second test, beside one with an empty cache; 0: none.
        repeat: Answers of each test.
        check: Instead: this loop beside a bare one of torch and transformers, in turns.
        subject: What generates.

    Raises:
        RecipeError: Answers too short to tell a speed.
    """
    if new_tokens < LEAST_NEW:
        raise RecipeError(f"{new_tokens} tokens are too few for a speed", fix="--new-tokens 128")
    backends = (subject or Subject()).backends()
    if check:
        return [_check_row(backend, new_tokens, repeat) for backend in backends]
    depths = [0, depth] if depth else [0]
    return [_row(backend, d, new_tokens, repeat) for backend in backends for d in depths]
