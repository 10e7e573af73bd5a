"""Servers as backends: any that speaks the OpenAI protocol, and Ollama with its own counters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from strixft.bench.generation import Generation, check_counters, prompt_text, require_tokens
from strixft.bench.weights import Weights
from strixft.catalog.hosts import Host
from strixft.servers.models import choose_name
from strixft.support.errors import HostError, RecipeError
from strixft.support.http import START_S, ask, base_url, stream
from strixft.support.tables import did_you_mean

Api = Literal["openai", "ollama"]

LISTS: dict[Api, tuple[str, str, str]] = {
    "openai": ("/v1/models", "data", "id"),
    "ollama": ("/api/tags", "models", "name"),
}
"""Where a server lists its models: path, key of the list, key of a name."""

NANO = 1e-9

MILLI = 1e-3


def find_api(url: str) -> Api:
    """Which protocol a server speaks: Ollama tells its version, others do not.

    Raises:
        HostError: There is no server.
    """
    try:
        ask(f"{url}/v1/models", timeout=START_S)
    except HostError as error:
        if "no server answers" in error.problem:
            raise
    try:
        return "ollama" if "version" in ask(f"{url}/api/version", timeout=START_S) else "openai"
    except HostError:
        return "openai"


def find_model(url: str, api: Api, asked: str) -> str:
    """The model to measure: the one asked for, or the only one that there is.

    Raises:
        HostError: There is none.
        RecipeError: There is no such model, or none is asked for and there are several.
    """
    path, key, name = LISTS[api]
    listed = ask(url + path, timeout=START_S).get(key)
    known = [str(model[name]) for model in listed or [] if name in model]
    return choose_name(url, asked, known, "--model with")


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

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.start_s


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind a server.

    Args:
        url: Of the server, without a path.
        model: As the server calls it.
        host: Where it runs; None where that is not known.
        weights: What the model reads; None where that is not known.
        file_gb: Size of its file.
    """

    url: str
    model: str
    host: Host | None = None
    weights: Weights | None = None
    read_gb: float | None = None

    @property
    def backend(self) -> str:
        """The protocol."""
        raise NotImplementedError

    @property
    def label(self) -> dict[str, Any]:
        """Columns that name it."""
        return {
            "backend": self.backend,
            "model": self.model.rsplit("/", 1)[-1],
            "variant": "served",
            "server": self.url,
        }

    @property
    def read_parameters(self) -> float | None:
        """Of the weights that it is said to have."""
        return self.weights.read_parameters if self.weights else None

    def bytes_per_token(self, depth: int) -> float | None:
        """Of the weights that it is said to have, and their cache."""
        if self.weights is None or self.read_gb is None:
            return None
        return self.read_gb * 1e9 + depth * (self.weights.cache_bytes_per_position or 0)

    def generate(self, prompt_tokens: int, new_tokens: int, seed: int) -> Generation:
        """One request; the prompt's tokens are those that the server counts."""
        generation = self._request(prompt_text(prompt_tokens), new_tokens)
        return require_tokens(self.url, generation, new_tokens)

    def _request(self, prompt: str, new_tokens: int) -> Generation:
        raise NotImplementedError

    def _ended_early(self, seen: _Stream, new_tokens: int) -> HostError:
        return HostError(
            f"the answer of {self.url} was cut off after {seen.parts} of {new_tokens} tokens",
            fix="look at the server's log (out of memory?), then type it again",
        )

    def _no_counters(self, missing: str) -> HostError:
        return HostError(
            f"{self.url} does not count its tokens: {missing} is missing",
            fix="a server that does: llama.cpp, Lemonade, vLLM, Ollama; or a newer version of it",
        )


class OpenAiServer(Served):
    """`/v1/completions`, streamed; llama.cpp's own `timings` where they come along."""

    @property
    def backend(self) -> str:
        """The protocol."""
        return "openai"

    def _request(self, prompt: str, new_tokens: int) -> Generation:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,  # llama.cpp and vLLM know it, others pass it over
        }
        seen, end, finished = _Stream(), dict[str, Any](), False
        for data in stream(f"{self.url}/v1/completions", body):
            for choice in data.get("choices") or []:
                if choice.get("text"):
                    seen.saw_text()
                finished = finished or bool(choice.get("finish_reason"))
            end |= {key: data[key] for key in ("usage", "timings") if data.get(key)}
        if not finished or seen.parts == 0:
            raise self._ended_early(seen, new_tokens)
        return self._generation(seen, end, seen.total_s)

    def _generation(self, seen: _Stream, end: Mapping[str, Any], total_s: float) -> Generation:
        usage = end.get("usage", {})
        for key in ("prompt_tokens", "completion_tokens"):
            if key not in usage:
                raise self._no_counters(f"usage.{key}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        first_s, tokens = seen.first_s - seen.start_s, usage["completion_tokens"]
        client = Generation(
            load_s=None,
            prompt_tokens=usage["prompt_tokens"] - cached,
            prompt_s=first_s,
            tokens=tokens,
            decoded=tokens - 1,
            decode_s=seen.last_s - seen.first_s,
            total_s=total_s,
            first_token_s=first_s,
            clock="client",
        )
        return self._by_server(client, end.get("timings", {}))

    def _by_server(self, client: Generation, timings: Mapping[str, Any]) -> Generation:
        needed = ("prompt_n", "prompt_ms", "predicted_n", "predicted_ms")
        if not all(key in timings for key in needed):
            return client
        prompt_n, prompt_ms, predicted_n, predicted_ms = (timings[key] for key in needed)
        rate = timings.get("prompt_per_second")
        check_counters(self.url, "the prompt", prompt_n, prompt_ms * MILLI, rate)
        rate = timings.get("predicted_per_second")
        decoded = check_counters(self.url, "the answer", predicted_n, predicted_ms * MILLI, rate)
        if predicted_n != client.tokens:
            raise HostError(
                f"{self.url} contradicts itself: {client.tokens} tokens in usage,"
                f" {predicted_n} in timings",
                fix="update the server; no figure of it is kept",
            )
        return Generation(
            load_s=None,
            prompt_tokens=prompt_n,
            prompt_s=prompt_ms * MILLI,
            tokens=predicted_n,
            decoded=decoded,
            decode_s=predicted_ms * MILLI,
            total_s=client.total_s,
            first_token_s=client.first_token_s,
            clock="server",
            client_decode_s=client.decode_s,
        )


class OllamaServer(Served):
    """`/api/generate`, streamed, with Ollama's own counters in nanoseconds."""

    @property
    def backend(self) -> str:
        """The protocol."""
        return "ollama"

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
            raise self._ended_early(seen, new_tokens)
        return self._generation(seen, end)

    def _generation(self, seen: _Stream, end: Mapping[str, Any]) -> Generation:
        needed = ("prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration")
        for key in (*needed, "total_duration"):
            if key not in end:
                raise self._no_counters(key)
        prompt_n, prompt_ns, tokens, decode_ns = (end[key] for key in needed)
        prompt_n -= end.get("prompt_eval_cached_count", 0)
        check_counters(self.url, "the prompt", prompt_n, prompt_ns * NANO, None)
        decoded = check_counters(self.url, "the answer", tokens, decode_ns * NANO, None)
        self._check_total(end)
        return Generation(
            load_s=end.get("load_duration", 0) * NANO,
            prompt_tokens=prompt_n,
            prompt_s=prompt_ns * NANO,
            tokens=tokens,
            decoded=decoded,
            decode_s=decode_ns * NANO,
            total_s=end["total_duration"] * NANO,
            first_token_s=seen.first_s - seen.start_s,
            clock="server",
            client_decode_s=seen.last_s - seen.first_s,
        )

    def _check_total(self, end: Mapping[str, Any]) -> None:
        parts = sum(
            end.get(k, 0) for k in ("load_duration", "prompt_eval_duration", "eval_duration")
        )
        if parts > end["total_duration"] * 1.02:
            raise HostError(
                f"{self.url} contradicts itself: {parts * NANO:.4g} s of parts in"
                f" {end['total_duration'] * NANO:.4g} s in all",
                fix="update the server; no figure of it is kept",
            )


SERVERS: dict[Api, type[Served]] = {"openai": OpenAiServer, "ollama": OllamaServer}


def find_server(address: str, api: str, model: str, **known: Any) -> Served:
    """The backend behind an address.

    Args:
        address: Such as `localhost:8080`.
        api: `auto`, `openai` or `ollama`.
        model: As the server calls it; empty where it has one only.
        **known: Host and weights, for the ceiling.

    Raises:
        HostError: No server answers there, or it has no model.
        RecipeError: No such protocol or model.
    """
    url = base_url(address)
    if api not in ("auto", *SERVERS):
        raise RecipeError(f"there is no api {api!r}", fix=did_you_mean(api, ("auto", *SERVERS)))
    chosen: Api = find_api(url) if api == "auto" else api  # type: ignore[assignment]
    return SERVERS[chosen](url=url, model=find_model(url, chosen, model), **known)
