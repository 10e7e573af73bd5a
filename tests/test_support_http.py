"""Servers: every fault of one is told with its address and what to type."""

import pytest
from http_server import Cut, serving

from strixft.support.errors import HostError
from strixft.support.http import ask, base_url, stream


@pytest.mark.parametrize("address", ["ftp://box", "http://", "://", "http://me:word@box"])
def test_an_address_that_names_no_server_is_refused(address: str) -> None:
    with pytest.raises(HostError, match="is not a server address") as caught:
        base_url(address)
    assert caught.value.fix.startswith("--server http://localhost:8080")


def test_a_server_that_is_down_is_told_with_how_to_start_one() -> None:
    with serving({}) as (url, _):
        pass
    with pytest.raises(HostError, match=r"no server answers at .*refused") as caught:
        ask(f"{url}/v1/models")
    assert "llama-server" in caught.value.fix


def test_a_servers_own_error_is_shown() -> None:
    routes = {"/a": lambda _: (503, {"error": {"message": "Loading model"}})}
    with serving(routes) as (url, _), pytest.raises(HostError, match="answers 503: Loading model"):
        ask(f"{url}/a")


def test_an_answer_that_is_no_json_asks_for_the_right_port() -> None:
    with serving({"/a": lambda _: b"<html>hello</html>"}) as (url, _):
        with pytest.raises(HostError, match="does not answer with JSON: '<html>hello") as caught:
            ask(f"{url}/a")
        assert "port" in caught.value.fix


def test_json_lines_and_events_are_read_alike() -> None:
    lines = ['{"n": 1}', "", ": comment", 'data: {"n": 2}', "data: [DONE]", '{"n": 3}']
    with serving({"/a": lambda _: lines}) as (url, _):
        assert [data["n"] for data in stream(f"{url}/a", {})] == [1, 2]


def test_an_error_inside_a_stream_ends_it() -> None:
    lines = ['data: {"n": 1}', 'data: {"error": {"message": "out of memory"}}']
    with (
        serving({"/a": lambda _: lines}) as (url, _),
        pytest.raises(HostError, match="an error: out"),
    ):
        list(stream(f"{url}/a", {}))


def test_half_a_line_at_the_end_is_no_answer() -> None:
    lines = ['{"n": 1}', '{"n":', Cut()]
    with (
        serving({"/a": lambda _: lines}) as (url, _),
        pytest.raises(HostError, match="truncated JSON"),
    ):
        list(stream(f"{url}/a", {}))


def test_a_key_is_sent_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"/a": lambda body: body}) as (url, _):
        assert ask(f"{url}/a") == {"authorization": None}
        monkeypatch.setenv("STRIXFT_API_KEY", "sesame")
        assert ask(f"{url}/a") == {"authorization": "Bearer sesame"}


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with serving({"/a": lambda _: {"ok": 1}}) as (url, _):
        assert ask(f"{url}/a") == {"ok": 1}


def test_a_character_that_some_take_for_a_line_end_does_not_end_one() -> None:
    lines = ['data: {"text": "a\u2028b\x85c"}', "data: [DONE]"]
    with serving({"/a": lambda _: lines}) as (url, _):
        assert [data["text"] for data in stream(f"{url}/a", {})] == ["a\u2028b\x85c"]
