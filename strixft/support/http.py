"""Requests to a server on the network, for JSON and for streams of it."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from strixft.support.errors import HostError
from strixft.support.text import OWN_KEY
from strixft.support.units import MIB

START_S = 10.0
"""Time limit of short requests such as a list of models, in seconds."""

ANSWER_S = 1800.0
"""Time limit of an answer, in seconds: the server may load a 70B first."""

SHOWN = 300
"""Most characters of a server's text in an error."""

LARGEST_BYTES = 256 * MIB
"""A longer answer is refused."""

JSON = "application/json"

LOOK = "look at the server's log"

START_ONE = (
    "start it (llama-server -m FILE.gguf, ollama serve, lemonade-server serve), or give its address"
)

WRONG_PLACE = "is this the right server and port?"

KEY_WANTED = f"export {OWN_KEY}=…   with a key that this server takes"

FIX_OF = {401: KEY_WANTED, 403: KEY_WANTED, 429: "ask it less often, or wait and try again"}
"""HTTP status → fix."""


def base_url(address: str) -> str:
    """Return an address without a trailing slash, `/v1` or `/api`.

    >>> base_url("localhost:13305/v1/"), base_url("http://box:8080")
    ('http://localhost:13305', 'http://box:8080')

    Raises:
        HostError: It names no host, or has a secret in it.
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
        holds = ": it holds a name, a password or a query" if secret else ""
        raise HostError(
            f"{shown!r} is not a server address{holds}",
            fix=f"--server http://localhost:8080; a key goes into {OWN_KEY}",
        )
    path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/api")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _refusal(url: str, answer: httpx.Response) -> HostError:
    """Build the error of an answer that is not a success, with the server's own words."""
    text = answer.reason_phrase
    with contextlib.suppress(httpx.RequestError):  # it refuses, and then breaks off
        text = next(answer.iter_bytes(MIB), b"").decode(errors="replace").strip() or text
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        inner = json.loads(text)["error"]
        text = str(inner["message"] if isinstance(inner, dict) else inner)
    place = answer.headers.get("Location")
    fix = f"give the address it names: {place}" if place else FIX_OF.get(answer.status_code, LOOK)
    return HostError(f"{url} answers {answer.status_code}: {text[:SHOWN]}", fix=fix)


@contextlib.contextmanager
def _open(url: str, body: Mapping[str, Any] | None, timeout: float) -> Iterator[httpx.Response]:
    """Send a request and give its answer, to be read within the block.

    Redirects are not followed: one would take the key to another host, and make a GET of a POST.
    An error's `__cause__` is httpx's, for those who decide on another try.
    """
    key = os.environ.get(OWN_KEY)
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
    # the certificates of the system, as other programs trust them; httpx brings its own
    verify = ssl.create_default_context() if url.startswith("https") else False
    # a proxy would look for this machine's servers on its own machine
    trust_env = urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
    options: dict[str, Any] = {"timeout": timeout, "verify": verify, "trust_env": trust_env}
    answer, method = None, "GET" if body is None else "POST"
    try:
        with httpx.stream(method, url, json=body, headers=headers, **options) as answer:
            try:
                answer.raise_for_status()
            except httpx.HTTPStatusError as error:
                raise _refusal(url, answer) from error
            yield answer
    except httpx.TimeoutException as error:
        raise HostError(
            f"no server answers at {url} within {timeout:g} s",
            fix="wait until it is free or has loaded its model, or give it more time",
        ) from error
    except (httpx.RequestError, httpx.InvalidURL, ImportError, OSError) as error:
        if answer is None:  # an ImportError names the package that a SOCKS proxy needs
            raise HostError(f"no server answers at {url}: {error}", fix=START_ONE) from error
        raise HostError(
            f"the answer of {url} was cut off after {answer.num_bytes_downloaded} bytes",
            fix=f"{LOOK} (out of memory?), then run the command again",
        ) from error


def _decode(text: bytes, url: str, media_type: str = JSON) -> dict[str, Any]:
    """Return a JSON object; raise for anything else, and for an error that the server reports."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text.decode(errors="replace")[:SHOWN]
        if text.lstrip().startswith(b"{"):  # another try may bring the rest of it
            cause = httpx.DecodingError(str(error))
            raise HostError(f"{url} answers with truncated JSON: {shown!r}", fix=LOOK) from cause
        told = "" if media_type == JSON else f" but {media_type}"
        raise HostError(
            f"{url} does not answer with JSON{told}: {shown!r}", fix=WRONG_PLACE
        ) from error
    if not isinstance(data, dict):
        raise HostError(f"{url} does not answer with a JSON object", fix=WRONG_PLACE)
    if said := data.get("error"):
        message = said.get("message") if isinstance(said, dict) else said
        raise HostError(f"{url} reports an error: {message}", fix=LOOK)
    return data


def ask(
    url: str, body: Mapping[str, Any] | None = None, timeout: float = ANSWER_S
) -> dict[str, Any]:
    """Return one JSON object, by GET, or by POST of a body.

    Args:
        url: Where to.
        body: The object to post.
        timeout: Seconds until the whole answer must be there.

    Raises:
        HostError: No server, an error of its own, an answer that is not JSON, or half of one.
    """
    ends, text = time.monotonic() + timeout, bytearray()
    with _open(url, body, timeout) as answer:
        for part in answer.iter_bytes():
            text += part
            if time.monotonic() > ends:  # a byte now and then keeps httpx's own limit away
                raise httpx.ReadTimeout("the answer as a whole is late")
            if len(text) > LARGEST_BYTES:
                raise HostError(
                    f"{url} answers with more than {LARGEST_BYTES // MIB} MiB", fix=LOOK
                )
    media_type = answer.headers.get("Content-Type", JSON).partition(";")[0].strip().lower()
    return _decode(bytes(text), url, media_type)


def stream(
    url: str, body: Mapping[str, Any], timeout: float = ANSWER_S
) -> Iterator[dict[str, Any]]:
    """Yield the objects of a streamed answer as they come: JSON lines, or server-sent events.

    Args:
        url: Where to.
        body: The object to post.
        timeout: Longest wait for the next bytes, in seconds.

    Raises:
        HostError: No server, an error of its own, an answer that is not JSON, or half of one.
    """
    with _open(url, body, timeout) as answer:
        for line in _lines(answer):
            text = line.strip().removeprefix(b"data:").strip()
            if text == b"[DONE]":
                return
            if text and not text.startswith(b":"):
                yield _decode(text, url)


def _lines(answer: httpx.Response) -> Iterator[bytes]:
    """Yield lines; httpx's own also end at characters that a JSON text may hold, as U+2028."""
    rest = b""
    for part in answer.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    yield rest
