"""Prefill and decode: tokens per second of reading prompts and of generating.

The tests are llama-bench's: `ppN` reads N prompt tokens, `tgN` makes N tokens from an empty cache,
`tgN@dM` behind a prompt of M tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import Field

from strixft.bench.generation import Backend, Generation
from strixft.bench.result import BenchRow, Options
from strixft.bench.roofline import (
    FLOP_PER_TOKEN,
    WEIGHTS,
    Ceiling,
    compute_ceiling,
    decode_ceiling,
    judge,
    read_bytes,
)
from strixft.bench.timing import Sample, take_turns
from strixft.catalog.hosts import HOSTS
from strixft.guard.host import find_host
from strixft.servers.models import is_local
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


class GenerationOptions(Options):
    """Options that choose a model and, for its ceiling, what is known of it."""

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
        from strixft.bench.in_process import load_model, load_run
        from strixft.recipe.load import load_recipe

        if self.run:
            yield from load_run(self.run)
        elif self.recipe:
            recipe = load_recipe(self.recipe)
            yield from load_model(recipe.model, recipe.method)
        else:
            yield from load_model(self.model or DEFAULT_MODEL, self.method)

    def _served(self) -> Backend:
        from strixft.bench.served import find_server

        here = find_host("auto") if is_local(base_url(self.server)) else None
        host = here if self.host == "auto" else HOSTS[self.host]
        weights = WEIGHTS[self.weights] if self.weights else None
        read_gb = None
        if weights and (self.quantisation or self.file_gb):
            read_gb = read_bytes(weights, self.quantisation, self.file_gb or None) / 1e9
        return find_server(
            self.server,
            self.api,
            self.model,
            host=host,
            weights=weights,
            read_gb=read_gb,
        )


class PrefillOptions(GenerationOptions):
    """Time the reading of prompts."""

    prompt_tokens: str = Field(
        "512", description="Comma-separated lengths; a server's own count is shown."
    )
    repeat: int = Field(5, ge=1, description="Prompts of each length, each with new words.")


class DecodeOptions(GenerationOptions):
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


def _generate(
    backend: Backend, prompt_tokens: int, new_tokens: int, repeat: int
) -> list[Generation]:
    """Warm up once, then measure; each prompt is new."""
    backend.generate(prompt_tokens, min(new_tokens, 8), 0)
    return [backend.generate(prompt_tokens, new_tokens, seed) for seed in range(1, repeat + 1)]


def _sample(generations: list[Generation], of: Callable[[Generation], float]) -> Sample:
    return Sample(tuple(map(of, generations)))


def _against(ceiling: Ceiling | None, tok_per_s: float) -> BenchRow:
    """Return the columns that compare a rate with its ceiling; unknowns are None."""
    if ceiling is None:
        return dict.fromkeys(("ceiling_tok_per_s", "share", "verdict"))
    return {
        "ceiling_tok_per_s": ceiling.tok_per_s,
        "share": ceiling.share(tok_per_s),
        "verdict": judge(tok_per_s, ceiling),
    }


def _prefill_row(backend: Backend, prompt_tokens: int, repeat: int) -> BenchRow:
    generations = _generate(backend, prompt_tokens, PREFILL_ANSWER, repeat)
    rate = _sample(generations, lambda one: one.prompt_tok_per_s)
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
        **rate.columns("tok_per_s"),
        "first_token_s": _sample(generations, lambda one: one.first_token_s).median,
        **_against(ceiling, rate.median),
        "clock": generations[0].clock,
    }


def bench_prefill(options: PrefillOptions) -> list[BenchRow]:
    """Time the reading of prompts.

    Raises:
        RecipeError: A prompt is too short to tell a speed.
    """
    for word in map(str.strip, options.prompt_tokens.split(",")):
        if not word.isdecimal() or int(word) < SHORT_PROMPT:
            raise RecipeError(
                f"a prompt of {word!r} tokens measures the start of a request, not a speed",
                fix=f"--prompt-tokens 512, and no fewer than {SHORT_PROMPT}",
            )
    lengths = [int(word) for word in options.prompt_tokens.split(",")]
    return [
        _prefill_row(backend, length, options.repeat)
        for backend in options.backends()
        for length in lengths
    ]


def _decode_row(backend: Backend, depth: int, new_tokens: int, repeat: int) -> BenchRow:
    generations = _generate(backend, depth or SHORTEST_PROMPT, new_tokens, repeat)
    first, rate = generations[0], _sample(generations, lambda one: one.tok_per_s)
    clients = [one.client_tok_per_s for one in generations if one.client_tok_per_s is not None]
    client = Sample(tuple(clients)).median if len(clients) == repeat else None
    # The cache grows while the answer is made: the mean depth counts.
    read = backend.bytes_per_token(first.prompt_tokens + new_tokens // 2)
    ceiling = decode_ceiling(backend.host, read) if backend.host and read else None

    def median(of: Callable[[Generation], float]) -> float:
        return _sample(generations, of).median

    return {
        **backend.label,
        "test": f"tg{new_tokens}" + (f"@d{depth}" if depth else ""),
        **rate.columns("tok_per_s"),
        "seconds_per_token": 1 / rate.median,
        "prompt_tokens": first.prompt_tokens,
        "tokens": first.tokens,
        "load_s": first.load_s,
        "first_token_s": median(lambda one: one.first_token_s),
        "prompt_s": median(lambda one: one.prompt_s),
        "prompt_tok_per_s": median(lambda one: one.prompt_tok_per_s),
        "decode_s": median(lambda one: one.decode_s),
        "total_s": median(lambda one: one.total_s),
        "gb_per_token": read and read / 1e9,
        **_against(ceiling, rate.median),
        "clock": first.clock,
        "client_tok_per_s": client,
        "off": client and client / rate.median - 1,
    }


def _check_row(backend: Backend, new_tokens: int, repeat: int) -> BenchRow:
    """Time our loop and a bare one in turns, to show the cost of the harness."""
    from strixft.bench.in_process import Loaded, bare_seconds

    if not isinstance(backend, Loaded):
        raise RecipeError("--check is for models in process", fix="drop --check, or --server")
    model, prompt = backend.model, backend.prompt(SHORTEST_PROMPT, 1)
    backend.generate(SHORTEST_PROMPT, new_tokens, 0)
    times = take_turns(
        {
            "ours": lambda: backend.generate(SHORTEST_PROMPT, new_tokens, 1).total_s,
            "bare": lambda: bare_seconds(model, prompt, new_tokens),
        },
        repeat,
    )
    rate, direct = (times[name].per(new_tokens) for name in ("ours", "bare"))
    return {
        **backend.label,
        "test": f"tg{new_tokens}, prompt included",
        **rate.columns("tok_per_s"),
        "direct_tok_per_s": direct.median,
        "off": rate.beside(direct),
    }


def bench_decode(options: DecodeOptions) -> list[BenchRow]:
    """Time the generation of tokens.

    Raises:
        RecipeError: The answers are too short to tell a speed.
    """
    new_tokens, repeat = options.new_tokens, options.repeat
    if new_tokens < LEAST_NEW:
        raise RecipeError(f"{new_tokens} tokens are too few for a speed", fix="--new-tokens 128")
    if options.check:
        return [_check_row(backend, new_tokens, repeat) for backend in options.backends()]
    depths = [0, options.depth] if options.depth else [0]
    return [
        _decode_row(backend, depth, new_tokens, repeat)
        for backend in options.backends()
        for depth in depths
    ]
