"""Requests to a server on the network: JSON, and streams of it. Every fault says what to type."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from strixft.support.errors import HostError
from strixft.support.text import OWN_KEY
from strixft.support.units import MIB

START_S = 10.0
"""How long a list of models may take."""

ANSWER_S = 1800.0
"""How long to wait for the next bytes of an answer: a 70B may be loaded first."""

SHOWN = 300

KEY = OWN_KEY
"""Variable with the key of a server that wants one."""

LARGEST_BYTES = 256 * MIB
"""A longer answer is none."""

JSON = "application/json"

START_ONE = (
    "start it (llama-server -m FILE.gguf, ollama serve, lemonade-server serve), or give its address"
)

LOOK = "look at the server's log"

KEY_WANTED = f"export {KEY}=…   with a key that this server takes"

FIX_OF = {401: KEY_WANTED, 403: KEY_WANTED, 429: "ask it less often, or wait and type it again"}
"""HTTP status → what to do."""


Data = Mapping[str, Any]


def base_url(address: str) -> str:
    """An address without a trailing slash or `/v1`.

    >>> base_url("localhost:13305/v1/"), base_url("http://box:8080")
    ('http://localhost:13305', 'http://box:8080')

    Raises:
        HostError: It names no host.
    """
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port beyond 65535
        named = False
    secret = "@" in url or "?" in url
    if not named or secret:
        shown = url.partition("?")[0].rpartition("@")[2]
        told = " with a name, a password or a query" if secret else ""
        raise HostError(
            f"{shown!r}{told} is no server's address",
            fix=f"--server http://localhost:8080; a key goes into {KEY}",
        )
    path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/api")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _said(error: urllib.error.HTTPError) -> str:
    """What a server answers to a request that it refuses."""
    try:
        text = error.read(MIB).decode(errors="replace")
        data = json.loads(text)
        inner = data["error"]
        return str(inner["message"] if isinstance(inner, dict) else inner)[:SHOWN]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text.strip()[:SHOWN] or str(error.reason)
    except (OSError, http.client.HTTPException):  # it refuses, and then does not say why
        return str(error.reason)


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to another host, and make a GET of a POST."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


_OPENER = urllib.request.build_opener(_StayHere)


def _refused(url: str, error: urllib.error.HTTPError) -> HostError:
    place = error.headers.get("Location")
    fix = f"give the address it names: {place}" if place else FIX_OF.get(error.code, LOOK)
    return HostError(f"{url} answers {error.code}: {_said(error)}", fix=fix)


def _unanswered(url: str, error: Exception, timeout: float) -> HostError:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return HostError(
            f"no server answers at {url} within {timeout:g} s",
            fix="wait until it is free or has loaded its model, or give it more time",
        )
    return HostError(f"no server answers at {url}: {reason}", fix=START_ONE)


def _open(url: str, body: Data | None, timeout: float) -> http.client.HTTPResponse:
    data = None if body is None else json.dumps(body).encode()
    headers, key = {"Content-Type": JSON}, os.environ.get(KEY)
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, data, headers)
    try:
        answer: http.client.HTTPResponse = _OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unanswered(url, error, timeout) from error
    return answer


def _decoded(text: bytes, url: str, kind: str = JSON) -> dict[str, Any]:
    """A JSON object, or an error that shows what came instead.

    Args:
        text: What came.
        url: From where.
        kind: Its media type, as the server says.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text.decode(errors="replace")[:SHOWN]
        if text.lstrip().startswith(b"{"):
            raise HostError(f"{url} answers no JSON that ends: {shown!r}", fix=LOOK) from error
        told = "" if kind == JSON else f" but {kind}"
        raise HostError(
            f"{url} answers no JSON{told}: {shown!r}", fix="is this the right server and port?"
        ) from error
    if not isinstance(data, dict):
        raise HostError(f"{url} answers no JSON object", fix="is this the right server and port?")
    return data


def _cut(url: str, received: int) -> HostError:
    return HostError(
        f"the answer of {url} was cut off after {received} parts",
        fix=f"{LOOK} (out of memory?), then type it again",
    )


def _whole(answer: http.client.HTTPResponse, url: str, ends: float) -> bytes:
    """The body of an answer; a server that sends a byte now and then does not hold us up.

    Args:
        answer: Its head is read.
        url: From where.
        ends: When it must be there, by the monotonic clock.
    """
    text = bytearray()
    while part := answer.read1(MIB):
        text += part
        if time.monotonic() > ends:
            raise TimeoutError
        if len(text) > LARGEST_BYTES:
            raise HostError(f"{url} answers more than {LARGEST_BYTES // MIB} MiB", fix=LOOK)
    if answer.length:
        raise http.client.IncompleteRead(bytes(text), answer.length)
    return bytes(text)


def ask(url: str, body: Data | None = None, timeout: float = ANSWER_S) -> dict[str, Any]:
    """One JSON object: by GET, or by POST of a body.

    Args:
        url: Where to.
        body: What is posted.
        timeout: Seconds until the whole answer must be there.

    Raises:
        HostError: No server, an error of its own, no JSON, or half an answer.
    """
    ends = time.monotonic() + timeout
    with _open(url, body, timeout) as answer:
        try:
            text = _whole(answer, url, ends)
        except TimeoutError as error:
            raise _unanswered(url, error, timeout) from error
        except (OSError, http.client.HTTPException) as error:
            raise _cut(url, 0) from error
        kind = answer.headers.get_content_type() if "Content-Type" in answer.headers else JSON
        return _checked(_decoded(text, url, kind), url)


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
        raise HostError(f"{url} stops: {text}", fix=LOOK)
    return data
