"""Servers as backends: any that speaks the OpenAI protocol, and Ollama with its own counters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from strixft.bench.generation import Generation, check_counters, prompt_text
from strixft.bench.roofline import Weights
from strixft.catalog.hosts import Host
from strixft.servers.models import choose_name, list_models
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import START_S, ask, base_url, stream
from strixft.support.tables import did_you_mean

NANO = 1e-9

MILLI = 1e-3

CONTRADICTS = "update the server; no figure of it is kept"


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


@dataclass
class _Stream:
    """Times of a streamed answer, by the client's clock."""

    start_s: float = field(default_factory=time.perf_counter)
    first_s: float = 0.0
    last_s: float = 0.0
    parts: int = 0

    def saw_text(self) -> None:
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.parts += 1


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind a server."""

    url: str
    """Address without a path."""
    model: str
    """Name by which the server knows it."""
    host: Host | None = None
    weights: Weights | None = None
    read_gb: float | None = None
    """Weights read for one token, 10⁹ bytes."""
    backend: ClassVar[str]
    """The protocol."""

    @property
    def label(self) -> dict[str, Any]:
        """The columns that name it."""
        model = self.model.rsplit("/", 1)[-1]
        names = {"backend": self.backend, "model": model, "variant": "served"}
        return {**names, "server": self.url}

    @property
    def read_parameters(self) -> float | None:
        """Parameters used for one token, if its weights are known."""
        return self.weights.read_parameters if self.weights else None

    def bytes_per_token(self, depth: int) -> float | None:
        """Return the bytes of weights and cache read for one token, if its weights are known."""
        if self.weights is None or self.read_gb is None:
            return None
        return self.read_gb * 1e9 + depth * (self.weights.cache_bytes_per_position or 0)

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """Make one request; the prompt's tokens are those that the server counts.

        Raises:
            HostError: The answer is too short to tell a speed, or not counted.
        """
        generation = self._request(prompt_text(prompt_tokens), new_tokens)
        if generation.tokens < min(new_tokens, max(2, new_tokens // 2)):
            raise HostError(
                f"{self.url} stopped after {generation.tokens} of {new_tokens} tokens",
                fix="is its context long enough? else a base model, or --new-tokens with fewer",
            )
        return generation

    def _request(self, prompt: str, new_tokens: int) -> Generation:
        raise NotImplementedError

    def _cut_off(self, seen: _Stream, new_tokens: int) -> HostError:
        return HostError(
            f"the answer of {self.url} was cut off after {seen.parts} of {new_tokens} tokens",
            fix="look at the server's log (out of memory?), then run the command again",
        )

    def _require(self, counters: Mapping[str, Any], *keys: str, where: str = "") -> list[Any]:
        """Return counters by their keys; refuse a server that does not send them."""
        for key in keys:
            if key not in counters:
                raise HostError(
                    f"{self.url} does not count its tokens: {where}{key} is missing",
                    fix="a server that does: llama.cpp, Lemonade, vLLM, Ollama;"
                    " or a newer version of it",
                )
        return [counters[key] for key in keys]


class OpenAiServer(Served):
    """`/v1/completions`, streamed; llama.cpp's own `timings` are used where they are sent."""

    backend = "openai"

    def _request(self, prompt: str, new_tokens: int) -> Generation:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,  # llama.cpp and vLLM know it, others ignore it
        }
        seen, end, finished = _Stream(), dict[str, Any](), False
        for data in stream(f"{self.url}/v1/completions", body):
            for choice in data.get("choices") or []:
                if choice.get("text"):
                    seen.saw_text()
                finished = finished or bool(choice.get("finish_reason"))
            end |= {key: data[key] for key in ("usage", "timings") if data.get(key)}
        total_s = time.perf_counter() - seen.start_s
        if not finished or seen.parts == 0:
            raise self._cut_off(seen, new_tokens)
        usage = end.get("usage", {})
        counted, tokens = self._require(usage, "prompt_tokens", "completion_tokens", where="usage.")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        first_token_s = seen.first_s - seen.start_s
        client = Generation(
            load_s=None,
            prompt_tokens=counted - cached,
            prompt_s=first_token_s,
            tokens=tokens,
            decoded=tokens - 1,
            decode_s=seen.last_s - seen.first_s,
            total_s=total_s,
            first_token_s=first_token_s,
            clock="client",
        )
        return self._by_server(client, end.get("timings", {}))

    def _by_server(self, client: Generation, timings: Mapping[str, Any]) -> Generation:
        """Replace the client's times by the server's, if it sends them."""
        needed = ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms")
        if not all(key in timings for key in needed):
            return client
        prompt_n, prompt_ms, tokens, decode_ms = (timings[key] for key in needed)
        rate = timings.get("prompt_per_second")
        check_counters(self.url, "the prompt", prompt_n, prompt_ms * MILLI, rate)
        rate = timings.get("predicted_per_second")
        decoded = check_counters(self.url, "the answer", tokens, decode_ms * MILLI, rate)
        if tokens != client.tokens:
            raise HostError(
                f"{self.url} contradicts itself: {client.tokens} tokens in usage,"
                f" {tokens} in timings",
                fix=CONTRADICTS,
            )
        return replace(
            client,
            prompt_tokens=prompt_n,
            prompt_s=prompt_ms * MILLI,
            decoded=decoded,
            decode_s=decode_ms * MILLI,
            clock="server",
            client_decode_s=client.decode_s,
        )


class OllamaServer(Served):
    """`/api/generate`, streamed, with Ollama's own counters in nanoseconds."""

    backend = "ollama"

    def _request(self, prompt: str, new_tokens: int) -> Generation:
        options = {
            "num_predict": new_tokens,
            "temperature": 0,
            "num_ctx": max(4096, 2 * len(prompt.split()) + new_tokens),
        }
        body = {"model": self.model, "prompt": prompt, "raw": True, "options": options}
        seen, end = _Stream(), dict[str, Any]()
        for data in stream(f"{self.url}/api/generate", body):
            if data.get("response"):
                seen.saw_text()
            if data.get("done"):
                end = data
        if not end or seen.parts == 0:
            raise self._cut_off(seen, new_tokens)
        prompt_n, prompt_ns, tokens, decode_ns, total_ns = self._require(
            end,
            "prompt_eval_count",
            "prompt_eval_duration",
            "eval_count",
            "eval_duration",
            "total_duration",
        )
        prompt_n -= end.get("prompt_eval_cached_count", 0)
        load_ns = end.get("load_duration", 0)
        check_counters(self.url, "the prompt", prompt_n, prompt_ns * NANO, None)
        decoded = check_counters(self.url, "the answer", tokens, decode_ns * NANO, None)
        parts_ns = load_ns + prompt_ns + decode_ns
        if parts_ns > total_ns * 1.02:
            raise HostError(
                f"{self.url} contradicts itself: {parts_ns * NANO:.4g} s of parts in"
                f" {total_ns * NANO:.4g} s in all",
                fix=CONTRADICTS,
            )
        return Generation(
            load_s=load_ns * NANO,
            prompt_tokens=prompt_n,
            prompt_s=prompt_ns * NANO,
            tokens=tokens,
            decoded=decoded,
            decode_s=decode_ns * NANO,
            total_s=total_ns * NANO,
            first_token_s=seen.first_s - seen.start_s,
            clock="server",
            client_decode_s=seen.last_s - seen.first_s,
        )


SERVERS: dict[str, type[Served]] = {"openai": OpenAiServer, "ollama": OllamaServer}


def find_server(address: str, api: str, model: str, **known: Any) -> Served:
    """Return the backend behind an address.

    Args:
        address: Such as `localhost:8080`.
        api: `auto`, `openai` or `ollama`.
        model: Name by which the server knows it; may be empty if it has only one.
        **known: Host and weights, for the ceiling.

    Raises:
        HostError: No server answers there, or it has no model.
        RecipeError: There is no such protocol or model.
    """
    url = base_url(address)
    if api not in ("auto", *SERVERS):
        raise RecipeError(f"there is no api {api!r}", fix=did_you_mean(api, ("auto", *SERVERS)))
    api = find_api(url) if api == "auto" else api
    return SERVERS[api](url=url, model=find_model(url, model), **known)
