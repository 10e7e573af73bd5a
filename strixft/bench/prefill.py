"""Reading prompts: tokens per second and time to the first token, llama-bench's `pp`."""

from __future__ import annotations

from collections.abc import Iterator

from strixft.bench.generation import (
    SHORT_PROMPT,
    Backend,
    prefill_roof,
    rate_columns,
    repeat_generation,
    sample,
)
from strixft.bench.result import Row
from strixft.bench.subject import Subject
from strixft.support.errors import HostError, RecipeError

ANSWER = 4
"""Tokens generated after each prompt: some servers count none for a single one."""


def _row(backend: Backend, prompt_tokens: int, repeat: int) -> Row:
    found = repeat_generation(backend, prompt_tokens, ANSWER, repeat)
    rate = sample(found, lambda one: one.prompt_tok_per_s)
    read = min(one.prompt_tokens for one in found)
    if read < prompt_tokens / 2:
        raise HostError(
            f"{backend.label['server']} read {read} of {prompt_tokens} tokens: it kept the rest",
            fix="turn its prompt cache off",
        )
    return {
        **backend.label,
        "test": f"pp{prompt_tokens}",
        "prompt_tokens": read,
        **rate_columns(rate),
        "first_token_s": sample(found, lambda one: one.first_token_s).median,
        **prefill_roof(backend, rate.median),
        "clock": found[0].clock,
    }


def _lengths(prompt_tokens: str) -> Iterator[int]:
    for word in prompt_tokens.split(","):
        if not word.strip().isdecimal() or int(word) < SHORT_PROMPT:
            raise RecipeError(
                f"a prompt of {word.strip()!r} tokens measures the start of a request, not a speed",
                fix=f"--prompt-tokens 512, and no fewer than {SHORT_PROMPT}",
            )
        yield int(word)


def bench_prefill(
    prompt_tokens: str = "512", repeat: int = 5, subject: Subject | None = None
) -> list[Row]:
    """Time how prompts are read.

    Args:
        prompt_tokens: Their lengths, comma between them; a server's own count is shown.
        repeat: Prompts of each length, each with other words.
        subject: What generates.
    """
    lengths = list(_lengths(prompt_tokens))
    return [
        _row(backend, length, repeat)
        for backend in (subject or Subject()).backends()
        for length in lengths
    ]
