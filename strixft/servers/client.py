"""The client: one request at a time, a time limit, retries, and a cache on disk.

A request that was answered once is not sent again, by any run. The name of an answer's file is a
digest of the server, the model and the request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from strixft.formats.messages import Message
from strixft.recipe.schema import Server
from strixft.servers.models import Listed, find_model, is_local, list_models, memory_warning
from strixft.support.errors import HostError, StrixftError
from strixft.support.files import now, write_json
from strixft.support.http import ask
from strixft.support.text import redact

FOLDER = "answers"

_THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answers."""

    text: str
    """Without the reasoning before it."""
    is_cut: bool
    """It ended because it was as long as allowed."""
    date: str
    """UTC, ISO 8601."""


def _read(url: str, data: Mapping[str, Any]) -> Answer:
    try:
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        text, ended = str(text), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise HostError(
            f"{url} answers JSON that is no chat completion: {json.dumps(data)[:300]}",
            fix="is it a server that speaks the OpenAI protocol?",
        ) from error
    return Answer(redact(_THOUGHT.sub("", text)).strip(), ended == "length", now())


class Client:
    """Asks one model of one server.

    Args:
        settings: Server, model and limits of a recipe.
        name: The recipe's section, for errors: `evaluate.judge`.
        cache: Folder under which answers are kept.
        offline: Servers on other machines are not asked.
        sleep: Waits some seconds.

    Raises:
        HostError: No server answers, it has no model, or it is not to be asked.
        RecipeError: It does not have the model, or several.
    """

    def __init__(
        self,
        settings: Server,
        name: str,
        cache: Path,
        *,
        offline: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.settings = settings.server, settings
        if offline and not is_local(self.url):
            raise HostError(
                f"the recipe is offline, and {self.url} is another machine",
                fix="--set offline=false   or a server on this machine",
            )
        self._folder, self._takes_schemas = cache / FOLDER, True
        self._retrying = Retrying(
            retry=retry_if_exception(may_pass),
            stop=stop_after_attempt(TRIES),
            wait=wait_s,
            sleep=sleep,
            reraise=True,
        )
        self.model: Listed = self._retrying(
            find_model, self.url, settings.model, f"--set {name}.model= and"
        )
        self.num_asked = self.num_kept = 0
        """Requests that were sent, and those that had been answered before."""

    @property
    def warnings(self) -> list[str]:
        """What somebody should know who trains at the same time."""
        text = memory_warning(self.url, self.model)
        return [text] if text else []

    def to_dict(self) -> dict[str, Any]:
        """Who answered, as plain data."""
        return {
            "server": self.url,
            "model": self.model.name,
            "on_npu": self.model.on_npu,
            "requests": self.num_asked,
            "requests_kept": self.num_kept,
        }

    def answer(
        self,
        messages: Sequence[Message],
        schema: Schema | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """The answer to a chat, from the cache or from the server.

        Args:
            messages: The chat.
            schema: JSON schema of the answer, for servers that know such.
            temperature: 0 is greedy.
            seed: Of the server's draws.

        Raises:
            HostError: No answer after some tries, or one that will not change.
        """
        body = {
            "model": self.model.name,
            "messages": list(messages),
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self.settings.max_tokens,
        }
        text = json.dumps([self.url, body, schema], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if (kept := _load(path)) is not None:
            self.num_kept += 1
            return kept
        self.num_asked += 1
        answer = self._ask(body, schema)
        with contextlib.suppress(OSError):  # a cache that cannot be written is none
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(answer))
        return answer

    def _ask(self, body: dict[str, Any], schema: Schema | None) -> Answer:
        if schema is None or not self._takes_schemas:
            return self._post(body)
        form = {"name": "answer", "strict": True, "schema": dict(schema)}
        try:
            return self._post(
                body | {"response_format": {"type": "json_schema", "json_schema": form}}
            )
        except HostError as error:
            if not is_refusal(error):
                raise
        answer = self._post(body)  # if this is refused too, it was not for the schema
        self._takes_schemas = False
        return answer

    def _post(self, body: dict[str, Any]) -> Answer:
        url = f"{self.url}/v1/chat/completions"
        try:
            return _read(url, self._retrying(ask, url, body, self.settings.timeout_s))
        except HostError as error:
            self._check_model(error)
            tries = self._retrying.statistics["attempt_number"]
            if tries == 1:
                raise
            raise HostError(f"{error.problem} ({tries} tries)", fix=error.fix) from error.__cause__

    def _check_model(self, error: HostError) -> None:
        """Say so if the model that was there is gone."""
        if status_of(error) != 404:
            return
        try:
            left = [model.name for model in list_models(self.url)]
        except HostError:
            return  # what it said first is the better hint
        if self.model.name not in left:
            raise HostError(
                f"{self.url} no longer has the model {self.model.name!r}; it has {', '.join(left)}",
                fix="load it there again, then type the same command again",
            ) from error.__cause__


def _load(path: Path) -> Answer | None:
    """An answer from disk; None where there is none, or the file is damaged."""
    try:
        return Answer(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


TRIES = 3

FIRST_WAIT_S = 2.0
"""Before the second try; twice as long before each further one."""

LONGEST_WAIT_S = 120.0
"""A server that asks for more is not waited for."""

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers that may be another one a little later (RFC 9110)."""

REFUSED = (400, 413, 422)
"""Answers that blame this request, and say nothing of the next."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of `strixft.servers`; None if no answer came."""
    cause = error.__cause__
    return cause.code if isinstance(cause, urllib.error.HTTPError) else None


def is_refusal(error: StrixftError) -> bool:
    """The server refuses this request, such as one that is too long, and may answer others."""
    return status_of(error) in REFUSED


def _asked_wait_s(error: BaseException) -> float | None:
    """What a server asks for with `Retry-After`: seconds, or a date."""
    cause = error.__cause__
    text = cause.headers.get("Retry-After") if isinstance(cause, urllib.error.HTTPError) else None
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def may_pass(error: BaseException) -> bool:
    """The same request may be answered a little later."""
    if not isinstance(error, HostError):
        return False
    if (status := status_of(error)) is not None:
        return status in BUSY and (_asked_wait_s(error) or 0) <= LONGEST_WAIT_S
    half = "no JSON that ends" in error.problem
    return half or isinstance(error.__cause__, OSError | HTTPException)


def wait_s(state: RetryCallState) -> float:
    """Seconds before the next try."""
    error = state.outcome.exception() if state.outcome else None
    asked = None if error is None else _asked_wait_s(error)
    growing = FIRST_WAIT_S * 2 ** (state.attempt_number - 1)
    return growing if asked is None else asked


_DECODER = json.JSONDecoder()


def text_schema(**texts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object of texts, all of them required.

    Args:
        **texts: What each of them may be, besides a text: `enum`, `maxLength`.
    """
    return {
        "type": "object",
        "properties": {name: {"type": "string", **rules} for name, rules in texts.items()},
        "required": list(texts),
        "additionalProperties": False,
    }


def find_object(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """The first JSON object in a text that has all of these texts; None if there is none.

    >>> find_object('Sure: {"a": {}} or {"a": "x", "b": 1}', ["a"])
    {'a': 'x'}
    """
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names):
            return {name: value[name] for name in names}
        start = text.find("{", start + 1)
    return None
