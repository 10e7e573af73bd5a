"""The client of OpenAI-compatible servers: which model, and every way in which a server fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe
from http_server import Cut, Raw, serving
from test_evaluate_judge import CHAT, MODELS, completion

from strixft.recipe.load import load_recipe
from strixft.recipe.servers import Server
from strixft.run.open import open_run
from strixft.servers.client import (
    Client,
    ListedModel,
    find_model,
    is_refusal,
    memory_warning,
)
from strixft.support.errors import HostError, RecipeError
from strixft.support.files import write_json

ASKED = [{"role": "user", "content": "Hi"}]
GOOD = json.dumps(completion("Hello.")).encode()


def listing(*rows: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    return {"/v1/models": lambda _: {"object": "list", "data": list(rows)}}


def client(url: str, folder: Path, waits: list[float] | None = None, **settings: Any) -> Client:
    """A client that does not sleep but notes how long it would."""
    waits = [] if waits is None else waits
    return Client(Server(server=url, **settings), "evaluate.judge", folder, sleep=waits.append)


def first_then(*answers: Any) -> Callable[[Any], Any]:
    """Answers in turn; the last one again and again."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


# Which model.


def test_the_only_model_for_the_npu_is_taken_by_itself() -> None:
    rows = [{"id": "a", "recipe": "llamacpp"}, {"id": "b-FLM", "recipe": "flm"}, {"id": "c"}]
    with serving(listing(*rows)) as (url, _):
        assert find_model(url, None, "--model").name == "b-FLM"
        assert find_model(url, None, "--model").on_npu is True
        assert find_model(url, "a", "--model").on_npu is False
        assert find_model(url, "c", "--model").on_npu is None


def test_a_model_that_is_not_there_is_told_with_the_near_one() -> None:
    with serving(listing({"id": "qwen3:latest"}, {"id": "gemma"})) as (url, _):
        assert find_model(url, "qwen3", "--model").name == "qwen3:latest"
        with pytest.raises(RecipeError, match="has no model 'gema'") as near:
            find_model(url, "gema", "--model")
        assert near.value.fix == "did you mean 'gemma'?"
        with pytest.raises(RecipeError, match="has several models") as several:
            find_model(url, None, "--set evaluate.judge.model= and")
    assert several.value.fix == "--set evaluate.judge.model= and one of: qwen3:latest, gemma"


@pytest.mark.parametrize("data", [{}, {"data": None}, {"data": 3}, {"data": ["x", {}]}])
def test_a_list_without_models_is_told(data: dict[str, Any]) -> None:
    with (
        serving({"/v1/models": lambda _: data}) as (url, _),
        pytest.raises(HostError, match="lists no model"),
    ):
        find_model(url, None, "--model")


def test_a_model_that_takes_memory_of_the_gpu_is_warned_about(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    on_gpu = ListedModel("big", "llamacpp", 5 * 2**30)
    (text,) = memory_warning("http://localhost:13305", on_gpu)
    assert "big on http://localhost:13305 takes GPU memory (5.00 GiB and more)" in text
    assert "in training now" not in text
    assert memory_warning("http://localhost:1", ListedModel("small", "flm")) == []
    assert memory_warning("http://10.0.0.9:1", on_gpu) == []

    (tmp_path / "recipes").mkdir()
    run = open_run(write_recipe(), "runs/night")
    with run.owned():
        write_json(run.folder / "status.json", {"stage": "train", "state": "running"})
        (busy,) = memory_warning("http://127.0.0.1:8080", ListedModel("x"))
    assert "does not say what runs it, so it may take GPU memory" in busy
    assert "; in training now: night." in busy


# Faults that pass.


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Raw(b'{"error": {"message": "busy"}}', 429, headers={"Retry-After": "7"}), [7.0]),
        (Raw(b'{"error": "busy"}', 429), [2.0]),
        (Raw(b"oops", 500, "text/plain"), [2.0]),
        ((503, {"error": {"message": "Loading model"}}), [2.0]),
        (Raw(GOOD[:30]), [2.0]),
        (Raw(GOOD[:30], missing_bytes=500), [2.0]),
        ([GOOD.decode()[:30], Cut()], [2.0]),
    ],
    ids=["429 with Retry-After", "429", "500", "loading", "half a JSON", "half a body", "cut"],
)
def test_a_fault_that_passes_is_tried_again(fault: Any, waits: list[float], tmp_path: Path) -> None:
    slept: list[float] = []
    with serving({**MODELS, CHAT: first_then(fault, Raw(GOOD))}) as (url, seen):
        assert client(url, tmp_path, slept).answer(ASKED).text == "Hello."
    assert slept == waits
    assert len([path for path, _ in seen if path == CHAT]) == 2


def test_a_date_to_wait_for_is_understood(tmp_path: Path) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    busy, slept = Raw(b"{}", 503, headers={"Retry-After": date}), list[float]()
    with serving({**MODELS, CHAT: first_then(busy, Raw(GOOD))}) as (url, _):
        client(url, tmp_path, slept).answer(ASKED)
    assert 0 < slept[0] <= 60


def test_a_server_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    models = first_then((503, {"error": "starting"}), {"data": [{"id": "m"}]})
    with serving({"/v1/models": models}) as (url, _):
        assert client(url, tmp_path).model.name == "m"


# Faults that stay.


@pytest.mark.parametrize(
    ("fault", "problem", "fix", "tries"),
    [
        (Raw(b"oops", 500, "text/plain"), r"answers 500: oops \(3 tries\)", "log", 3),
        (Raw(GOOD[:25]), r"truncated JSON: '\{\"choices.* \(3 tries\)", "log", 3),
        (Raw(GOOD[:25], missing_bytes=9), r"was cut off .* \(3 tries\)", "out of memory", 3),
        ([GOOD.decode()[:25], Cut()], r"was cut off .* \(3 tries\)", "out of memory", 3),
        (
            Raw(b"<html>Sign in</html>", kind="text/html"),
            "does not answer with JSON but text/html: '<html>Sign in",
            "right server and port",
            1,
        ),
        (
            Raw(b"data: {}\n\n", kind="text/event-stream"),
            "does not answer with JSON but text/event-stream",
            "right server and port",
            1,
        ),
        (Raw(b"[]"), "does not answer with a JSON object", "right server and port", 1),
        (Raw(b'{"ok": true}'), 'not a chat completion: {"ok": true}', "OpenAI protocol", 1),
        (Raw(b'{"choices": []}'), "not a chat completion", "OpenAI protocol", 1),
        (Raw(b'{"error": "no memory left"}'), "reports an error: no memory left", "log", 1),
        (Raw(b"", 401), "answers 401: Unauthorized", "export STRIXFT_API_KEY=", 1),
        (
            Raw(b"", 302, headers={"Location": "http://other/v1"}),
            "answers 302: Found",
            "give the address it names: http://other/v1",
            1,
        ),
        (
            Raw(b'{"error": "quota"}', 429, headers={"Retry-After": "3600"}),
            "answers 429: quota",
            "ask it less often",
            1,
        ),
        (Raw(b'{"error": "too long"}', 400), "answers 400: too long", "log", 1),
    ],
    ids=[
        "500", "half a JSON", "half a body", "stream cut", "HTML", "wrong content type", "a list",
        "other JSON", "no choice", "error in 200", "no key", "redirect", "429 for an hour", "400",
    ],
)  # fmt: skip
def test_a_fault_that_stays_is_told(
    fault: Any, problem: str, fix: str, tries: int, tmp_path: Path
) -> None:
    with serving({**MODELS, CHAT: lambda _: fault}) as (url, seen):
        one = client(url, tmp_path)
        with pytest.raises(HostError, match=problem) as caught:
            one.answer(ASKED)
    assert fix in caught.value.fix
    assert len([path for path, _ in seen if path == CHAT]) == tries
    assert is_refusal(caught.value) == (getattr(fault, "status", 0) == 400)
    assert not list((tmp_path / "answers").glob("*"))


def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    ends = threading.Event()
    with serving({**MODELS, CHAT: lambda _: Raw(GOOD, until=ends)}) as (url, seen):
        one = client(url, tmp_path, timeout_s=0.2)
        try:
            with pytest.raises(HostError, match=r"within 0\.2 s \(3 tries\)") as caught:
                one.answer(ASKED)
        finally:
            ends.set()
    assert "give it more time" in caught.value.fix
    assert len([path for path, _ in seen if path == CHAT]) == 3


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(tmp_path: Path) -> None:
    """Each byte comes in time; the answer as a whole does not."""
    ends = threading.Event()

    def drip(_: Any) -> Any:
        return [" " for _ in range(200) if not ends.wait(0.0)]

    with serving({**MODELS, CHAT: drip}) as (url, _):
        one = client(url, tmp_path, timeout_s=1e-6)
        with pytest.raises(HostError, match=r"within 1e-06 s"):
            one.answer(ASKED)


def test_a_model_that_is_gone_is_told_with_what_is_left(tmp_path: Path) -> None:
    lists = first_then({"data": [{"id": "m"}]}, {"data": [{"id": "other"}]})
    with serving({"/v1/models": lists, CHAT: lambda _: (404, {"error": "not found"})}) as (url, _):
        one = client(url, tmp_path)
        with pytest.raises(HostError, match="no longer has the model 'm'; it has other") as caught:
            one.answer(ASKED)
    assert "load it there again" in caught.value.fix


def test_a_server_that_went_away_is_told(tmp_path: Path) -> None:
    with serving({**MODELS, CHAT: lambda _: Raw(GOOD)}) as (url, _):
        one = client(url, tmp_path)
    slept: list[float] = []
    one._retrying.sleep = slept.append
    with pytest.raises(HostError, match=r"no server answers at .* \(3 tries\)") as caught:
        one.answer(ASKED)
    assert slept == [2.0, 4.0]
    assert "llama-server" in caught.value.fix


# The cache.


def test_an_answer_is_kept_for_the_same_request_only(tmp_path: Path) -> None:
    with serving({**MODELS, CHAT: lambda _: Raw(GOOD)}) as (url, seen):
        one = client(url, tmp_path)
        first = one.answer(ASKED)
        assert one.answer(ASKED) == first
        assert client(url, tmp_path).answer(ASKED) == first
        one.answer(ASKED, seed=1)
        one.answer(ASKED, {"type": "object"})
        client(url, tmp_path, max_tokens=99).answer(ASKED)
    assert len([path for path, _ in seen if path == CHAT]) == 4
    assert (one.num_asked, one.num_kept) == (3, 1)


def test_a_damaged_or_unwritable_cache_is_none(tmp_path: Path) -> None:
    with serving({**MODELS, CHAT: lambda _: Raw(GOOD)}) as (url, _):
        client(url, tmp_path).answer(ASKED)
        (file,) = (tmp_path / "answers").iterdir()
        file.write_text('{"text": ')
        assert client(url, tmp_path).answer(ASKED).text == "Hello."
        (tmp_path / "file").write_text("")
        assert client(url, tmp_path / "file").answer(ASKED).text == "Hello."


# The recipe.


@pytest.mark.parametrize(
    "address", ["http://me:hunter2hunter2@box", "box:80?api_key=hunter2hunter2"]
)
def test_a_key_in_an_address_is_refused_and_not_shown(
    write_recipe: WriteRecipe, address: str
) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.judge\.server: '.*box") as caught:
        load_recipe(write_recipe(evaluate={"judge": {"server": address}}))
    assert "STRIXFT_API_KEY" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_judge_may_be_set_from_the_command_line(write_recipe: WriteRecipe) -> None:
    path = write_recipe(evaluate={"judge": None})
    recipe = load_recipe(path, {"evaluate.judge.server": "localhost:13305/v1"})
    assert recipe.evaluate.judge is not None
    assert recipe.evaluate.judge.server == "http://localhost:13305"
    with pytest.raises(RecipeError, match=r"evaluate\.judge\.server: is missing"):
        load_recipe(path, {"evaluate.judge.max_rows": 3})
