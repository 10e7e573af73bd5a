"""Who is told how a run ended: a real server, a real program, and failures that end no run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import WriteRecipe

from strixft.recipe.load import check_recipe
from strixft.run.folder import Run
from strixft.run.notify import told
from strixft.run.open import open_run
from strixft.support.errors import FitError, RecipeError, Stopped

Posts = list[tuple[str, dict[str, str], str]]


@pytest.fixture
def server() -> Iterator[tuple[str, Posts]]:
    """A server that notes what is sent to it; `/gone` and `/services` are errors."""
    seen: Posts = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            seen.append((self.path, dict(self.headers), body))
            self.send_response(404 if self.path.startswith(("/gone", "/services")) else 200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}", seen
        one.shutdown()


def a_run(write_recipe: WriteRecipe, folder: Path, *targets: str) -> Run:
    return open_run(write_recipe(notify=list(targets)), folder / "run")


def test_a_server_is_told_of_the_end(
    write_recipe: WriteRecipe, tmp_path: Path, server: tuple[str, Posts]
) -> None:
    url, seen = server
    with told(a_run(write_recipe, tmp_path, f"ntfy:{url}/topic", f"webhook:{url}/hook")):
        pass
    (path, headers, body), (hook, _, data) = seen
    assert (path, headers["Title"], body) == ("/topic", "strixft: run done", "finished")
    assert hook == "/hook"
    assert '"state":"done"' in data.replace(" ", "")
    assert '"content"' in data


def test_a_program_is_told_of_an_error(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "told"
    program = tmp_path / "tell"
    program.write_text(f'#!/bin/sh\necho "$STRIXFT_STATE: $STRIXFT_TEXT" > {out}\n')
    program.chmod(0o755)
    run = a_run(write_recipe, tmp_path, f"command:{program}")
    with pytest.raises(FitError), told(run):
        raise FitError("too large", fix="less")
    assert out.read_text() == "failed: too large\nfix: less\n"
    with pytest.raises(Stopped), told(run):
        raise Stopped("asked", fix="again")
    assert out.read_text().startswith("stopped: asked")


def test_a_secret_address_stays_in_the_environment(
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, Posts],
) -> None:
    monkeypatch.setenv("MY_HOOK", f"{server[0]}/secret")
    run = a_run(write_recipe, tmp_path, "webhook:$MY_HOOK")
    with told(run):
        pass
    assert [path for path, *_ in server[1]] == ["/secret"]
    assert "/secret" not in (run.folder / "recipe.yaml").read_text()


def test_a_message_that_cannot_be_sent_is_a_warning(
    write_recipe: WriteRecipe,
    tmp_path: Path,
    server: tuple[str, Posts],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = ("command:/no/such/program", f"ntfy:{server[0]}/gone", "webhook:http://127.0.0.1:1/x")
    with told(a_run(write_recipe, tmp_path, *bad)):
        pass
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(" by ")[2].partition(":")[0] for line in warnings] == [
        "command",
        "ntfy",
        "webhook",
    ]


def test_a_failure_tells_neither_address_nor_arguments(
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, Posts],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cyrax321/SNAGLINE#390, codeforboston/CutePetsBoston#161: a webhook's address is its key."""
    monkeypatch.setenv("MY_HOOK", f"{server[0]}/services/T0/B0/abcdefgh")
    bad = (
        "webhook:$MY_HOOK",
        "ntfy:$MY_HOOK",
        f"command:{sys.executable} -c exit(3) --to=abcdefgh",
    )
    with told(a_run(write_recipe, tmp_path, *bad)):
        pass
    said = capsys.readouterr().err
    assert "abcdefgh" not in said
    assert said.count("the server answered 404") == 2
    assert "ended with exit code 3" in said


@pytest.mark.parametrize("target", ["mail", "ntfy:topic", "webhook:", "command: ", "desktop:x"])
def test_a_target_that_is_none(target: str) -> None:
    data = {"model": "m", "dataset": {"source": "s"}, "notify": [target]}
    with pytest.raises(RecipeError, match="notify: should hold desktop, ntfy:URL"):
        check_recipe(data, name="r")


def test_offline_sends_nothing() -> None:
    data = {"model": "m", "dataset": {"source": "s"}, "offline": True}
    check_recipe({**data, "notify": ["desktop", "command:true"]}, name="r")
    with pytest.raises(RecipeError, match="offline: is true, and notify would send to ntfy"):
        check_recipe({**data, "notify": ["ntfy:https://ntfy.sh/x"]}, name="r")
