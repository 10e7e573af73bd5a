"""Requests to a server on the network: JSON, and streams of it. Every fault says what to type."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from strixft.errors import HostError

START_S = 10.0
"""How long a list of models may take."""
ANSWER_S = 1800.0
"""How long to wait for the next bytes of an answer: a 70B may be loaded first."""
SHOWN = 300
KEY = "STRIXFT_API_KEY"
"""Variable with the key of a server that wants one."""
START_ONE = (
    "start it (llama-server -m FILE.gguf, ollama serve, lemonade-server serve), or give its address"
)

Data = Mapping[str, Any]


def base_url(address: str) -> str:
    """An address without a trailing slash or `/v1`.

    >>> base_url("localhost:13305/v1/"), base_url("http://box:8080")
    ('http://localhost:13305', 'http://box:8080')

    Raises:
        HostError: It names no host.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise HostError(
            f"{address!r} is no server's address",
            fix=f"--server http://localhost:8080; a key goes into {KEY}",
        )
    path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/api")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _said(error: urllib.error.HTTPError) -> str:
    """What a server answers to a request that it refuses."""
    text = error.read().decode(errors="replace")
    try:
        data = json.loads(text)
        inner = data["error"]
        return str(inner["message"] if isinstance(inner, dict) else inner)[:SHOWN]
    except (ValueError, KeyError, TypeError):
        return text.strip()[:SHOWN] or str(error.reason)


def _open(url: str, body: Data | None, timeout: float) -> http.client.HTTPResponse:
    data = None if body is None else json.dumps(body).encode()
    headers, key = {"Content-Type": "application/json"}, os.environ.get(KEY)
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, data, headers)
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise HostError(
            f"{url} answers {error.code}: {_said(error)}", fix="look at the server's log"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise HostError(f"no server answers at {url}: {reason}", fix=START_ONE) from error
    return answer


def _decoded(text: bytes, url: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        shown = text.decode(errors="replace")[:SHOWN]
        raise HostError(
            f"{url} answers no JSON: {shown!r}", fix="is this the right server and port?"
        ) from error
    if not isinstance(data, dict):
        raise HostError(f"{url} answers no JSON object", fix="is this the right server and port?")
    return data


def _cut(url: str, received: int) -> HostError:
    return HostError(
        f"the answer of {url} was cut off after {received} parts",
        fix="look at the server's log (out of memory?), then type it again",
    )


def ask(url: str, body: Data | None = None, timeout: float = ANSWER_S) -> dict[str, Any]:
    """One JSON object: by GET, or by POST of a body.

    Raises:
        HostError: No server, an error of its own, no JSON, or half an answer.
    """
    with _open(url, body, timeout) as answer:
        try:
            return _decoded(answer.read(), url)
        except (OSError, http.client.HTTPException) as error:
            raise _cut(url, 0) from error


def stream(url: str, body: Data, timeout: float = ANSWER_S) -> Iterator[dict[str, Any]]:
    """Objects of a streamed answer as they come: JSON lines, or server-sent events.

    Raises:
        HostError: No server, an error of its own, no JSON, or a connection that breaks.
    """
    received = 0
    with _open(url, body, timeout) as answer:
        try:
            for line in answer:
                text = line.strip().removeprefix(b"data:").strip()
                if not text or text.startswith(b":"):
                    continue
                if text == b"[DONE]":
                    return
                yield _checked(_decoded(text, url), url)
                received += 1
        except (OSError, http.client.HTTPException) as error:
            raise _cut(url, received) from error


def _checked(data: dict[str, Any], url: str) -> dict[str, Any]:
    """An object of a stream, unless it tells of an error."""
    if data.get("error"):
        said = data["error"]
        text = said.get("message") if isinstance(said, dict) else said
        raise HostError(f"{url} stops: {text}", fix="look at the server's log")
    return data
