"""`Backend`: something that generates and is timed; servers of the OpenAI protocol, and Ollama."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from strixft.catalog.hosts import Host
from strixft.servers.client import choose_name, list_models
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import START_S, ask, base_url, stream
from strixft.support.tables import did_you_mean

TOLERANCE = 0.02
"""Largest difference between a server's rate and its own count ÷ duration, as a fraction."""

WORDS = (
    "river table window garden engine paper market winter summer doctor letter number planet"
    " animal island bridge kitchen forest mountain station village castle picture music"
)
"""Words that are one token each in usual vocabularies."""

CONTRADICTS = "update the server; no figure of it is kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Times (seconds) and counts (tokens) of one request, as `ollama run --verbose` has them."""

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


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A model that generates, and what is known of it."""

    model: Any
    """The model itself, or its name on the server."""
    label: dict[str, Any]
    """The first columns of its rows: `backend`, `model`, `variant`, `server`."""
    host: Host | None = None
    """The machine it runs on."""
    read_parameters: float | None = None
    """Parameters used for one token."""
    read_bytes: float | None = None
    """Their bytes."""
    cache_bytes_per_position: float = 0.0

    def bytes_per_token(self, depth: int) -> float | None:
        """Return the bytes read for one token behind `depth` tokens in the cache, if known."""
        return self.read_bytes and self.read_bytes + depth * self.cache_bytes_per_position

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Read a prompt of about so many tokens, and make an answer of so many."""
        raise NotImplementedError


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
        fix=CONTRADICTS,
    )


def _require(counters: Mapping[str, Any], *keys: str, url: str, where: str = "") -> list[Any]:
    """Return counters by their keys; refuse a server that does not send them."""
    for key in keys:
        if key not in counters:
            raise HostError(
                f"{url} does not count its tokens: {where}{key} is missing",
                fix="a server that does: llama.cpp, Lemonade, vLLM, Ollama;"
                " or a newer version of it",
            )
    return [counters[key] for key in keys]


class Server(Backend):
    """A model behind a server; each request is streamed."""

    path: ClassVar[str]

    @property
    def url(self) -> str:
        """Address without a path."""
        return str(self.label["server"])

    def _body(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        raise NotImplementedError

    def _read(self, event: Mapping[str, Any]) -> tuple[bool, bool]:
        """Return whether an event of the answer has text, and whether it is the last with any."""
        raise NotImplementedError

    def _counters(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a generation that stand in the last events.

        Raises:
            HostError: They are missing or contradict each other.
        """
        raise NotImplementedError

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Make one request; the prompt is new, and its tokens are those that the server counts.

        Raises:
            HostError: The answer is too short to tell a speed, or not counted.
        """
        prompt = " ".join(random.choices(WORDS.split(), k=max(1, prompt_tokens)))
        start, ended, end, texts_s = time.perf_counter(), False, dict[str, Any](), list[float]()
        for event in stream(f"{self.url}{self.path}", self._body(prompt, new_tokens)):
            has_text, is_last = self._read(event)
            ended = ended or is_last
            if has_text:
                texts_s.append(time.perf_counter() - start)
            end |= {key: value for key, value in event.items() if value is not None}
        total_s = time.perf_counter() - start
        if not ended or not texts_s:
            raise HostError(
                f"the answer of {self.url} was cut off after {len(texts_s)} of {new_tokens} tokens",
                fix="look at the server's log (out of memory?), then run the command again",
            )
        counters, first_s, decode_s = self._counters(end), texts_s[0], texts_s[-1] - texts_s[0]
        tokens = counters["tokens"]
        if tokens < min(new_tokens, max(2, new_tokens // 2)):
            raise HostError(
                f"{self.url} stopped after {tokens} of {new_tokens} tokens",
                fix="is its context long enough? else a base model, or --new-tokens with fewer",
            )
        ours = {
            "load_s": None,
            "prompt_s": first_s,
            "decoded": tokens - 1,
            "decode_s": decode_s,
            "total_s": total_s,
            "clock": "client",
            "client_decode_s": decode_s if "clock" in counters else None,
        }
        return Generation(first_token_s=first_s, **{**ours, **counters})


class OpenAiServer(Server):
    """`/v1/completions`; llama.cpp's own `timings` are used where they are sent."""

    path = "/v1/completions"

    def _body(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,  # llama.cpp and vLLM know it, others ignore it
        }

    def _read(self, event: Mapping[str, Any]) -> tuple[bool, bool]:
        choices = event.get("choices") or []
        return any(c.get("text") for c in choices), any(c.get("finish_reason") for c in choices)

    def _counters(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Return `timings` of llama.cpp, else `usage`; tokens from the cache were not read."""
        usage, timings = (end.get(key, {}) for key in ("usage", "timings"))
        keys = ("prompt_tokens", "completion_tokens")
        prompt, tokens = _require(usage, *keys, url=self.url, where="usage.")
        needed = ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms")
        if not all(key in timings for key in needed):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return {"prompt_tokens": prompt - cached, "tokens": tokens}
        prompt, prompt_ms, predicted, decode_ms = (timings[key] for key in needed)
        prompt_s, decode_s = prompt_ms / 1e3, decode_ms / 1e3
        rate = timings.get("prompt_per_second")
        check_counters(self.url, "the prompt", prompt, prompt_s, rate)
        rate = timings.get("predicted_per_second")
        decoded = check_counters(self.url, "the answer", predicted, decode_s, rate)
        if predicted != tokens:
            raise HostError(
                f"{self.url} contradicts itself: {tokens} tokens in usage, {predicted} in timings",
                fix=CONTRADICTS,
            )
        return {
            "prompt_tokens": prompt,
            "prompt_s": prompt_s,
            "tokens": tokens,
            "decoded": decoded,
            "decode_s": decode_s,
            "clock": "server",
        }


class OllamaServer(Server):
    """`/api/generate`, with Ollama's own counters in nanoseconds."""

    path = "/api/generate"

    def _body(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        options = {
            "num_predict": new_tokens,
            "temperature": 0,
            "num_ctx": max(4096, 2 * len(prompt.split()) + new_tokens),
        }
        return {"model": self.model, "prompt": prompt, "raw": True, "options": options}

    def _read(self, event: Mapping[str, Any]) -> tuple[bool, bool]:
        return bool(event.get("response")), bool(event.get("done"))

    def _counters(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Return the counters of the last event; tokens from the cache were not read."""
        times = ("prompt_eval_duration", "eval_duration", "total_duration")
        keys = ("prompt_eval_count", "eval_count", *times)
        prompt, tokens, *taken = _require(end, *keys, url=self.url)
        prompt_s, decode_s, total_s = (duration / 1e9 for duration in taken)
        load_s = end.get("load_duration", 0) / 1e9
        prompt -= end.get("prompt_eval_cached_count", 0)
        check_counters(self.url, "the prompt", prompt, prompt_s, None)
        decoded = check_counters(self.url, "the answer", tokens, decode_s, None)
        parts_s = load_s + prompt_s + decode_s
        if parts_s > total_s * (1 + TOLERANCE):
            raise HostError(
                f"{self.url} contradicts itself: {parts_s:.4g} s of parts in {total_s:.4g} s"
                " in all",
                fix=CONTRADICTS,
            )
        return {
            "load_s": load_s,
            "prompt_tokens": prompt,
            "prompt_s": prompt_s,
            "tokens": tokens,
            "decoded": decoded,
            "decode_s": decode_s,
            "total_s": total_s,
            "clock": "server",
        }


SERVERS: dict[str, type[Server]] = {"openai": OpenAiServer, "ollama": OllamaServer}


def find_api(url: str) -> str:
    """Return the protocol of a server: only Ollama tells its version."""
    try:
        return "ollama" if "version" in ask(f"{url}/api/version", timeout=START_S) else "openai"
    except HostError:
        return "openai"


def find_model(url: str, asked: str) -> str:
    """Return the name of the model to measure: the one asked for, or the only one.

    Raises:
        HostError: No server answers, or it has no model.
        RecipeError: It has no such model, or several and none is asked for.
    """
    return choose_name(url, asked, [model.name for model in list_models(url)], "--model with")


def find_server(address: str, api: str, model: str, **known: Any) -> Server:
    """Return the backend behind an address.

    Args:
        address: Such as `localhost:8080`.
        api: `auto`, `openai` or `ollama`.
        model: Name by which the server knows it; may be empty if it has only one.
        **known: Fields of `Backend` for the ceiling.

    Raises:
        HostError: No server answers there, or it has no model.
        RecipeError: There is no such protocol or model.
    """
    url = base_url(address)
    if api not in ("auto", *SERVERS):
        raise RecipeError(f"there is no api {api!r}", fix=did_you_mean(api, ("auto", *SERVERS)))
    api, model = find_api(url) if api == "auto" else api, find_model(url, model)
    shown = model.rsplit("/", 1)[-1]
    label = {"backend": api, "model": shown, "variant": "served", "server": url}
    return SERVERS[api](model=model, label=label, **known)
