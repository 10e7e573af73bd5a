"""Decode and prefill behind servers: figures by their counters, and no figure from bad ones."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import EMBEDDED
from http_server import Cut, serving

from strixft.bench.backends import find_api, find_model
from strixft.bench.run import read_store, run_bench
from strixft.support.errors import HostError, RecipeError, StrixftError

MODELS = {"data": [{"id": "tiny"}]}
TAGS = {"data": [{"id": "tiny:latest"}]}


def _event(data: Any) -> str:
    return f"data: {json.dumps(data)}"


def _tokens(count: int) -> list[Any]:
    return [_event({"choices": [{"text": " a", "finish_reason": None}]}) for _ in range(count)]


def completions(**end: Any) -> Callable[[dict[str, Any]], list[Any]]:
    """`/v1/completions` of a server that ends with these counters."""

    def answer(body: dict[str, Any]) -> list[Any]:
        count, prompt = body["max_tokens"], len(body["prompt"].split())
        usage = {"prompt_tokens": prompt, "completion_tokens": count}
        last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": usage}
        timings = {
            "prompt_n": prompt,
            "prompt_ms": 100.0,
            "prompt_per_second": prompt / 0.1,
            "predicted_n": count,
            "predicted_ms": 2000.0,
            "predicted_per_second": count / 2,
        }
        changed = {"usage": usage, "timings": timings} | end
        given = {key: value for key, value in changed.items() if value is not None}
        return [*_tokens(count), _event({**last, "usage": None, **given}), "data: [DONE]"]

    return answer


def measure(routes: dict[str, Any], bench: str = "decode", **settings: Any) -> Any:
    """Measure a server with these routes."""
    with serving({"/v1/models": lambda _: MODELS, **routes}) as (url, _):
        return run_bench(bench, server=url, repeat=2, **settings)


def refused(
    routes: dict[str, Any], kind: type[StrixftError] = HostError, **more: Any
) -> StrixftError:
    """The error; nothing may be stored."""
    with pytest.raises(kind) as caught:
        measure(routes, **more)
    assert read_store().results == []
    return caught.value


# What is measured.


def test_a_llama_server_is_measured_by_its_own_counters() -> None:
    result = measure({"/v1/completions": completions()}, new_tokens=32)
    first, behind = result.rows
    assert [row["test"] for row in result.rows] == ["tg32", "tg32@d512"]
    assert (first["tok_per_s"], first["clock"]) == (16.0, "server")
    assert behind["prompt_tokens"] == 512
    assert behind["prompt_tok_per_s"] == pytest.approx(5120)
    assert behind["client_tok_per_s"] > 0
    assert behind["verdict"] is None  # nothing is known of the model
    assert result.host["type"] == "server"


def test_a_server_without_timings_is_measured_by_our_clock() -> None:
    def slow(body: dict[str, Any]) -> list[Any]:
        time.sleep(0.02)
        return completions(timings=None)(body)

    row = measure({"/v1/completions": slow}, new_tokens=16, depth=0).rows[0]
    assert row["clock"] == "client"
    assert row["client_tok_per_s"] is None
    assert row["first_token_s"] >= 0.02


def test_tokens_that_the_server_kept_do_not_count() -> None:
    usage = {
        "prompt_tokens": 512,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 500},
    }
    error = refused({"/v1/completions": completions(usage=usage, timings=None)}, bench="prefill")
    assert "read 12 of 512 tokens and took the rest from its cache" in error.problem
    assert error.fix == "turn its prompt cache off"


def test_the_ceiling_of_a_servers_model_that_is_named() -> None:
    known = {"weights": "Llama 3.3 70B", "quantisation": "Q4_K_M", "host": "strix-halo-128"}
    row = measure({"/v1/completions": completions()}, new_tokens=32, depth=0, **known).rows[0]
    assert row["ceiling_tok_per_s"] == pytest.approx(6.1, abs=0.1)
    assert row["verdict"] == "impossible"


def test_no_prompt_is_sent_twice() -> None:
    with serving({"/v1/models": lambda _: MODELS, "/v1/completions": completions()}) as (url, seen):
        run_bench("prefill", server=url, repeat=3)
    prompts = [body["prompt"] for path, body in seen if path == "/v1/completions"]
    assert len(set(prompts)) == len(prompts) == 4
    assert all(len(prompt.split()) == 512 for prompt in prompts)


# Ollama.


def generate(**end: Any) -> Callable[[dict[str, Any]], list[Any]]:
    """`/api/generate` of an Ollama that ends with these counters."""

    def answer(body: dict[str, Any]) -> list[Any]:
        count = body["options"]["num_predict"]
        last = {
            "done": True,
            "total_duration": 3_000_000_000,
            "load_duration": 500_000_000,
            "prompt_eval_count": len(body["prompt"].split()),
            "prompt_eval_duration": 250_000_000,
            "eval_count": count,
            "eval_duration": 2_000_000_000,
        } | end
        tokens = [json.dumps({"response": " a", "done": False}) for _ in range(count)]
        return [*tokens, json.dumps({k: v for k, v in last.items() if v is not None})]

    return answer


def ollama(**end: Any) -> dict[str, Any]:
    """Routes of an Ollama."""
    return {
        "/api/version": lambda _: {"version": "0.30.0"},
        "/v1/models": lambda _: TAGS,
        "/api/generate": generate(**end),
    }


def test_ollama_is_found_and_measured_by_its_nanoseconds() -> None:
    result = measure(ollama(), new_tokens=64, depth=256)
    behind = result.rows[1]
    assert (behind["backend"], behind["tok_per_s"], behind["load_s"]) == ("ollama", 32.0, 0.5)
    assert behind["prompt_tok_per_s"] == pytest.approx(1024)
    assert result.details()[1].splitlines() == [
        "tg64@d256, served",
        "total duration:       3s",
        "load duration:        500ms",
        "prompt eval count:    256 token(s)",
        "prompt eval duration: 250ms",
        "prompt eval rate:     1024.00 tokens/s",
        "eval count:           64 token(s)",
        "eval duration:        2s",
        "eval rate:            32.00 tokens/s",
    ]


def test_prompt_tokens_from_ollamas_cache_do_not_count() -> None:
    row = measure(ollama(prompt_eval_cached_count=2), new_tokens=64, depth=0).rows[0]
    assert row["prompt_tokens"] == 2


@pytest.mark.parametrize("key", ["prompt_eval_count", "eval_count", "eval_duration"])
def test_a_counter_of_ollama_that_is_missing_is_named(key: str) -> None:
    error = refused(ollama(**{key: None}))
    assert f"does not count its tokens: {key} is missing" in error.problem


def test_parts_of_ollama_that_are_longer_than_the_whole_are_refused() -> None:
    error = refused(ollama(total_duration=1_000_000_000))
    assert "contradicts itself: 2.75 s of parts in 1 s in all" in error.problem


# Faults.


def test_a_model_that_the_server_does_not_have_names_the_near_one() -> None:
    error = refused({"/v1/completions": completions()}, RecipeError, model="tinny")
    assert error.problem.endswith("has no model 'tinny'")
    assert error.fix == "did you mean 'tiny'?"


def test_of_several_models_one_has_to_be_named() -> None:
    two = {"data": [{"id": "a"}, {"id": "b"}]}
    with serving({"/v1/models": lambda _: two}) as (url, _):
        with pytest.raises(RecipeError, match="several models") as caught:
            find_model(url, "")
        assert caught.value.fix == "--model with one of: a, b"
        assert find_model(url, "b") == "b"


def test_a_server_without_a_model_says_so() -> None:
    none: dict[str, Any] = {"/v1/models": lambda _: {"data": []}}
    with serving(none) as (url, _), pytest.raises(HostError, match="lists no model"):
        find_model(url, "")


def test_which_protocol_a_server_speaks_is_asked() -> None:
    with serving({"/v1/models": lambda _: MODELS}) as (url, _):
        assert find_api(url) == "openai"
    with serving(ollama()) as (url, _):
        assert find_api(url) == "ollama"


def test_a_stream_that_is_cut_off_gives_no_figure() -> None:
    error = refused({"/v1/completions": lambda body: [*_tokens(5), Cut()]})
    assert re.search(r"was cut off after \d+ bytes", error.problem)
    assert "log" in error.fix


def test_a_stream_that_ends_without_its_last_event_gives_no_figure() -> None:
    error = refused({"/v1/completions": lambda body: [*_tokens(5)]})
    assert "was cut off after 5 of 8 tokens" in error.problem


def test_ollama_cut_off_gives_no_figure() -> None:
    routes = ollama() | {"/api/generate": lambda _: [json.dumps({"response": "a"}), Cut()]}
    assert re.search(r"was cut off after \d+ bytes", refused(routes).problem)


def test_a_server_that_counts_nothing_is_refused() -> None:
    error = refused({"/v1/completions": completions(usage=None, timings=None)})
    assert "does not count its tokens: usage.prompt_tokens is missing" in error.problem


def test_a_rate_that_is_not_count_by_duration_is_refused() -> None:
    wrong = {
        "prompt_n": 4,
        "prompt_ms": 100.0,
        "predicted_n": 8,
        "predicted_ms": 2000.0,
        "predicted_per_second": 900.0,
    }
    error = refused({"/v1/completions": completions(timings=wrong)})
    assert "8 tokens in 2 s are 4 tokens/s, and it says 900" in error.problem


def test_a_rate_without_the_first_token_is_right() -> None:
    def answer(body: dict[str, Any]) -> list[Any]:
        count = body["max_tokens"]
        timings = {
            "prompt_n": 4,
            "prompt_ms": 100.0,
            "predicted_n": count,
            "predicted_ms": 1000.0,
            "predicted_per_second": count - 1.0,
        }
        return completions(timings=timings)(body)

    row = measure({"/v1/completions": answer}, new_tokens=16, depth=0).rows[0]
    assert row["tok_per_s"] == 15


def test_counts_that_differ_are_refused() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 7}
    error = refused({"/v1/completions": completions(usage=usage)})
    assert "7 tokens in usage, 8 in timings" in error.problem


def test_an_answer_that_stops_early_is_refused() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 3}
    error = refused({"/v1/completions": completions(usage=usage, timings=None)}, new_tokens=128)
    assert "stopped after 3 of" in error.problem


def test_an_unknown_api_is_refused() -> None:
    error = refused({}, RecipeError, api="olama")
    assert error.fix == "did you mean 'ollama'?"


def test_too_few_tokens_are_refused_before_anything_is_asked() -> None:
    with pytest.raises(RecipeError, match="measures the start of a request") as caught:
        run_bench("prefill", server="localhost:1", prompt_tokens="13")
    assert "--prompt-tokens 512" in caught.value.fix
    with pytest.raises(RecipeError, match="too few for a speed"):
        run_bench("decode", server="localhost:1", new_tokens=4)


# A real server.


def test_a_real_llama_server_agrees_with_our_clock() -> None:
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp as a Python package: .[dev]")
    from strixft.model.files import embedded_file

    settings = llama.CommonParams()
    settings.model.path = str(embedded_file(EMBEDDED))
    settings.n_ctx, settings.n_parallel, settings.port = 1024, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = llama.Server(settings)
    result = run_bench("decode", server=server.listening_address, new_tokens=48, depth=64, repeat=2)
    for row in result.rows:
        assert row["clock"] == "server"
        assert row["tokens"] == 48
        assert abs(row["off"]) < 0.05
    assert 60 <= result.rows[1]["prompt_tokens"] <= 70


def test_pictures_are_timed_kept_and_measured(tmp_path: Path) -> None:
    from base64 import b64encode

    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (64).to_bytes(4) + (32).to_bytes(4) + b"\x08"
    bodies: list[dict[str, Any]] = []

    def draw(body: dict[str, Any]) -> Any:
        bodies.append(body)
        time.sleep(0.01)
        return {"data": [{"b64_json": b64encode(png).decode()}]}

    routes = {"/v1/images/generations": draw, "/v1/models": lambda _: {"data": [{"id": "z"}]}}
    with serving(routes) as (url, _):
        both = f"vulkan={url},rocm={url}/v1"
        rows = run_bench("image", server=both, steps=8, repeat=2, folder=str(tmp_path)).rows
    assert [row["backend"] for row in rows] == ["vulkan", "rocm"]
    assert rows[0]["size"] == "64x32"
    assert rows[0]["seconds_per_step"] == pytest.approx(rows[0]["seconds"] / 8)
    assert rows[0]["seconds"] >= 0.01
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert {(body["n"], body["response_format"]) for body in bodies} == {(1, "b64_json")}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"data": []}, "without an image in data"),
        ({"data": [{"url": "http://x"}]}, "without an image in data"),
        ({"data": [{"b64_json": "aGVsbG8="}]}, "bytes that are not an image"),
    ],
)
def test_an_answer_without_a_picture_is_refused(answer: Any, says: str, tmp_path: Path) -> None:
    routes = {
        "/v1/images/generations": lambda _: answer,
        "/v1/models": lambda _: {"data": [{"id": "z"}]},
    }
    with serving(routes) as (url, _), pytest.raises(HostError, match=says):
        run_bench("image", server=url, folder=str(tmp_path))


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="'large' is not the size"):
        run_bench("image", size="large")
