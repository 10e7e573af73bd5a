"""Prefill and decode: tokens per second of reading prompts and of generating.

The tests are llama-bench's: `ppN` reads N prompt tokens, `tgN` makes N tokens from an empty cache,
`tgN@dM` behind a prompt of M tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from pydantic import Field

from strixft.bench.backends import Backend, Generation, find_server
from strixft.bench.roofline import (
    FLOP_PER_TOKEN,
    WEIGHTS,
    Ceiling,
    compute_ceiling,
    decode_ceiling,
    judge,
    read_bytes,
)
from strixft.bench.run import Bench, BenchRow
from strixft.bench.timing import columns, rate_columns
from strixft.catalog.hosts import HOSTS
from strixft.guard.host import find_host
from strixft.servers.client import is_local
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import base_url

DEFAULT_MODEL = "embedded:smollm2-135m"

SHORTEST_PROMPT = 4
"""Prompt tokens where the cache should be empty: enough words to be new to the server."""

SHORT_PROMPT = 64
"""Prompt tokens below which a rate measures the start of a request rather than a speed."""

PREFILL_ANSWER = 4
"""Tokens generated after each prompt: some servers count none for a single one."""

LEAST_NEW = 16


class Generating(Bench):
    """A bench of a model, with options for its ceiling."""

    model: str = Field("", description="Hub id, folder or embedded model; or the server's name.")
    recipe: str = Field("", description="Recipe: its model, stored as its method stores it.")
    run: str = Field("", description="Run: its base, then with the adapter, then merged.")
    server: str = Field(
        "",
        description="Address of a server, such as localhost:8080 (Lemonade 13305, Ollama 11434).",
    )
    api: str = Field("auto", description="Protocol of the server: openai or ollama; auto asks it.")
    method: str = Field("lora", description="Storage of weights in process: qlora for 4 bit.")
    weights: str = Field(
        "", description="The server's model, for the ceiling: gpt-oss-120b, Qwen3 8B, …"
    )
    quantisation: str = Field("", description="Its quantisation: Q4_K_M, MXFP4, …")
    file_gb: float = Field(
        0.0, ge=0, description="Size of its file in 10⁹ bytes, instead of the quantisation."
    )
    host: str = Field(
        "auto",
        description="Host of the server, for the ceiling; auto is this machine if it is local.",
    )

    def backends(self) -> Iterator[Backend]:
        """Yield the backends; those in process share memory, so each ends with the next.

        Raises:
            RecipeError: More than one source is named.
        """
        named = [key for key in ("server", "run", "recipe") if getattr(self, key)]
        if len(named) > 1:
            fix = f"keep one of --{' --'.join(named)}"
            raise RecipeError(f"{' and '.join(named)} cannot be measured at once", fix=fix)
        if self.server:
            yield self._served()
            return
        from strixft.bench.in_process import load_model, load_run  # no server needs all of it
        from strixft.recipe.load import load_recipe

        if self.run:
            yield from load_run(self.run)
        elif self.recipe:
            recipe = load_recipe(self.recipe)
            yield from load_model(recipe.model, recipe.method)
        else:
            yield from load_model(self.model or DEFAULT_MODEL, self.method)

    def _served(self) -> Backend:
        here = find_host("auto") if is_local(base_url(self.server)) else None
        host = here if self.host == "auto" else HOSTS[self.host]
        if not self.weights:
            return find_server(self.server, self.api, self.model, host=host)
        weights, read = WEIGHTS[self.weights], None
        if self.quantisation or self.file_gb:
            read = read_bytes(weights, self.quantisation, self.file_gb or None)
        return find_server(
            *(self.server, self.api, self.model),
            host=host,
            read_parameters=weights.read_parameters,
            read_bytes=read,
            cache_bytes_per_position=weights.cache_bytes_per_position or 0.0,
        )


def _generations(
    backend: Backend, prompt_tokens: int, new_tokens: int, repeat: int
) -> list[Generation]:
    """Warm up once, then measure; each prompt is new."""
    backend.generate(prompt_tokens, min(new_tokens, 8), 0)
    return [backend.generate(prompt_tokens, new_tokens, seed) for seed in range(1, repeat + 1)]


def _medians(generations: list[Generation], *names: str) -> BenchRow:
    return {name: statistics.median(getattr(one, name) for one in generations) for name in names}


def _against(ceiling: Ceiling | None, tok_per_s: float) -> BenchRow:
    """Return the columns that compare a rate with its ceiling; unknowns are None."""
    if ceiling is None:
        return dict.fromkeys(("ceiling_tok_per_s", "share", "verdict"))
    return {
        "ceiling_tok_per_s": ceiling.tok_per_s,
        "share": ceiling.share(tok_per_s),
        "verdict": judge(tok_per_s, ceiling),
    }


class Prefill(Generating):
    """Time the reading of prompts."""

    prompt_tokens: str = Field(
        "512", description="Comma-separated lengths; a server's own count is shown."
    )
    repeat: int = Field(5, ge=1, description="Prompts of each length, each with new words.")

    def measure(self) -> list[BenchRow]:
        """Time prompts of each length.

        Raises:
            RecipeError: A prompt is too short to tell a speed.
        """
        words = [word.strip() for word in self.prompt_tokens.split(",")]
        for word in words:
            if not word.isdecimal() or int(word) < SHORT_PROMPT:
                raise RecipeError(
                    f"a prompt of {word!r} tokens measures the start of a request, not a speed",
                    fix=f"--prompt-tokens 512, and no fewer than {SHORT_PROMPT}",
                )
        return [self._row(backend, int(word)) for backend in self.backends() for word in words]

    def _row(self, backend: Backend, prompt_tokens: int) -> BenchRow:
        generations = _generations(backend, prompt_tokens, PREFILL_ANSWER, self.repeat)
        rate = columns("tok_per_s", [one.prompt_tok_per_s for one in generations])
        read = min(one.prompt_tokens for one in generations)
        if read < prompt_tokens / 2:
            raise HostError(
                f"{backend.label['server']} read {read} of {prompt_tokens} tokens"
                " and took the rest from its cache",
                fix="turn its prompt cache off",
            )
        host, parameters = backend.host, backend.read_parameters
        flop = FLOP_PER_TOKEN["forward"]
        ceiling = compute_ceiling(host, parameters, flop) if host and parameters else None
        return {
            **backend.label,
            "test": f"pp{prompt_tokens}",
            "prompt_tokens": read,
            **rate,
            **_medians(generations, "first_token_s"),
            **_against(ceiling, rate["tok_per_s"]),
            "clock": generations[0].clock,
        }


class Decode(Generating):
    """Time the generation of tokens."""

    new_tokens: int = Field(128, ge=0, description="Tokens of each answer.")
    depth: int = Field(
        512,
        ge=0,
        description="Prompt tokens of a second test, beside the one with an empty cache; 0: none.",
    )
    repeat: int = Field(5, ge=1, description="Answers of each test.")
    check: bool = Field(
        False,
        description="Instead, time this loop beside a bare one of torch and transformers.",
    )

    def measure(self) -> list[BenchRow]:
        """Time answers from an empty cache and behind a prompt.

        Raises:
            RecipeError: The answers are too short to tell a speed.
        """
        if self.new_tokens < LEAST_NEW:
            raise RecipeError(
                f"{self.new_tokens} tokens are too few for a speed", fix="--new-tokens 128"
            )
        if self.check:
            return [self._check_row(backend) for backend in self.backends()]
        depths = [0, self.depth] if self.depth else [0]
        return [self._row(backend, depth) for backend in self.backends() for depth in depths]

    def _row(self, backend: Backend, depth: int) -> BenchRow:
        new_tokens, repeat = self.new_tokens, self.repeat
        generations = _generations(backend, depth or SHORTEST_PROMPT, new_tokens, repeat)
        first, rate = generations[0], columns("tok_per_s", [one.tok_per_s for one in generations])
        clients = [one.client_tok_per_s for one in generations if one.client_tok_per_s is not None]
        client = statistics.median(clients) if len(clients) == repeat else None
        # The cache grows while the answer is made: the mean depth counts.
        read = backend.bytes_per_token(first.prompt_tokens + new_tokens // 2)
        ceiling = decode_ceiling(backend.host, read) if backend.host and read else None
        parts = ("first_token_s", "prompt_s", "prompt_tok_per_s", "decode_s", "total_s")
        return {
            **backend.label,
            "test": f"tg{new_tokens}" + (f"@d{depth}" if depth else ""),
            **rate,
            "seconds_per_token": 1 / rate["tok_per_s"],
            "prompt_tokens": first.prompt_tokens,
            "tokens": first.tokens,
            "load_s": first.load_s,
            **_medians(generations, *parts),
            "gb_per_token": read and read / 1e9,
            **_against(ceiling, rate["tok_per_s"]),
            "clock": first.clock,
            "client_tok_per_s": client,
            "off": client and client / rate["tok_per_s"] - 1,
        }

    def _check_row(self, backend: Backend) -> BenchRow:
        """Time our loop and a bare one in turns, to show the cost of the harness."""
        from strixft.bench.in_process import Loaded, bare_seconds

        if not isinstance(backend, Loaded):
            raise RecipeError("--check is for models in process", fix="drop --check, or --server")
        new_tokens, prompt = self.new_tokens, backend.prompt(SHORTEST_PROMPT, 1)
        backend.generate(SHORTEST_PROMPT, new_tokens, 0)
        rate = rate_columns(
            "tok_per_s",
            new_tokens,
            self.repeat,
            lambda: backend.generate(SHORTEST_PROMPT, new_tokens, 1).total_s,
            lambda: bare_seconds(backend.model, prompt, new_tokens),
        )
        return {**backend.label, "test": f"tg{new_tokens}, prompt included", **rate}
