"""A server's models, and a client of its chat completions: time limit, retries, cache on disk.

A request that was answered once is not sent again, by any run. The name of an answer's file is a
digest of the server, the model and the request.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

from strixft.formats.messages import Message
from strixft.recipe.servers import Server
from strixft.run.open import find_runs
from strixft.support.errors import HostError, RecipeError, StrixftError
from strixft.support.files import now, write_json
from strixft.support.http import START_S, ask
from strixft.support.tables import did_you_mean
from strixft.support.text import redact
from strixft.support.units import format_gib

NPU = "flm"
"""Lemonade's `recipe` of a model on the NPU (lemonade-sdk/lemonade: docs/api/openai.md)."""

OLLAMA_TAG = ":latest"


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model as `GET /v1/models` lists it."""

    name: str
    recipe: str | None = None
    """Name of the engine that runs it, where the server tells, as Lemonade does."""
    num_bytes: int | None = None
    """Size of its file, where the server tells, as llama.cpp does."""

    @property
    def on_npu(self) -> bool | None:
        """Return whether it runs on the NPU; None where the server does not tell."""
        return None if self.recipe is None else self.recipe == NPU


def list_models(url: str) -> list[ListedModel]:
    """List the models that a server offers.

    Raises:
        HostError: No server answers, or it lists none.
    """
    rows = ask(f"{url}/v1/models", timeout=START_S).get("data")
    found = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and "id" in row:
            recipe, meta = row.get("recipe"), row.get("meta")
            size = meta.get("size") if isinstance(meta, dict) else None
            found.append(
                ListedModel(
                    str(row["id"]),
                    recipe if isinstance(recipe, str) else None,
                    size if isinstance(size, int) else None,
                )
            )
    if not found:
        raise HostError(f"{url} lists no model", fix="load or pull one, then run the command again")
    return found


def choose_name(url: str, asked: str | None, known: Sequence[str], setting: str) -> str:
    """Return the name of the model asked for, or of the only one.

    Args:
        url: The server's, for errors.
        asked: Name that the user gives.
        known: Names that the server lists.
        setting: Text to type before a name, such as `--model`.

    Raises:
        RecipeError: There is no such model, or none is asked for and there are several.
    """
    if not asked and len(known) == 1:
        return known[0]
    same = [name for name in known if asked in (name, name.removesuffix(OLLAMA_TAG))]
    if same:
        return same[0]
    fix = did_you_mean(asked, known) if asked else f"{setting} one of: {', '.join(known)}"
    raise RecipeError(
        f"{url} has no model {asked!r}" if asked else f"{url} has several models", fix=fix
    )


def find_model(url: str, asked: str | None, setting: str) -> ListedModel:
    """Find the model asked for, the only one, or the only one for the NPU.

    Raises:
        HostError: No server answers, or it has no model.
        RecipeError: There is no such model, or none is asked for and there are several.
    """
    found = {model.name: model for model in list_models(url)}
    on_npu = [name for name, model in found.items() if model.on_npu]
    known = on_npu if not asked and len(on_npu) == 1 else list(found)
    return found[choose_name(url, asked, known, setting)]


def is_local(url: str) -> bool:
    """Return whether the server runs on this machine.

    >>> is_local("http://localhost:13305"), is_local("http://[::1]:80"), is_local("http://10.1.2.3")
    (True, True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host in ("localhost", platform.node().lower())


def memory_warning(url: str, model: ListedModel) -> list[str]:
    """Warn of the memory that a model takes from a training run on the same machine.

    Args:
        url: Address of its server.
        model: One of its models.

    Returns:
        One warning, or none for the NPU and for other machines.
    """
    if model.on_npu or not is_local(url):
        return []
    takes = "does not say what runs it, so it may take" if model.on_npu is None else "takes"
    size = "" if model.num_bytes is None else f" ({format_gib(model.num_bytes)} and more)"
    states = [(run.name, run.status()) for run in find_runs()]
    busy = [
        name
        for name, status in states
        if (status.get("stage"), status.get("state")) == ("train", "running")
    ]
    told = f"; in training now: {', '.join(busy)}" if busy else ""
    return [
        f"{model.name} on {url} {takes} GPU memory{size} from a run that is trained on this machine"
        f" at the same time{told}. A model with recipe {NPU} runs on the NPU."
    ]


FOLDER = "answers"
"""Subfolder of the cache."""

TRIES = 3

FIRST_WAIT_S = 2.0
"""Wait before the second try; doubled before each further one."""

LONGEST_WAIT_S = 120.0
"""A server that asks for a longer wait is given up."""

BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses that may change a little later (RFC 9110)."""

REFUSED = (400, 413, 422)
"""Statuses that blame this request and say nothing of the next."""

_THOUGHT = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)

_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a model."""

    text: str
    """Without the reasoning before it."""
    is_cut: bool
    """It ended because it reached the longest length allowed."""
    date: str
    """UTC, ISO 8601."""


def _refused_answer(error: BaseException | None) -> httpx.Response | None:
    """Return the HTTP answer behind an error of `strixft.support.http`; None if none came."""
    cause = error.__cause__ if error else None
    return cause.response if isinstance(cause, httpx.HTTPStatusError) else None


def is_refusal(error: StrixftError) -> bool:
    """Return whether the server refuses this request (too long, say) and may answer others."""
    answer = _refused_answer(error)
    return answer is not None and answer.status_code in REFUSED


def _retry_after_s(error: BaseException | None) -> float | None:
    """Return the wait that a server asks for with `Retry-After`, which is seconds or a date."""
    answer = _refused_answer(error)
    text = "" if answer is None else answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed a little later."""
    if not isinstance(error, HostError):
        return False
    if (answer := _refused_answer(error)) is not None:
        return answer.status_code in BUSY and (_retry_after_s(error) or 0) <= LONGEST_WAIT_S
    return isinstance(error.__cause__, httpx.RequestError)


def _wait_s(state: RetryCallState) -> float:
    asked = _retry_after_s(state.outcome.exception() if state.outcome else None)
    return wait_exponential(FIRST_WAIT_S)(state) if asked is None else asked


class Client:
    """A client of one model on one server.

    Args:
        settings: Server, model and limits of a recipe.
        section: The recipe's section, for errors: `evaluate.judge`.
        cache: Folder under which answers are kept.
        offline: Refuse servers on other machines.
        sleep: Waits some seconds.

    Raises:
        HostError: No server answers, it has no model, or the recipe is offline.
        RecipeError: The server does not have the model, or has several.
    """

    def __init__(
        self,
        settings: Server,
        section: str,
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
                settings={"offline": False},
            )
        self._folder, self._takes_schemas = cache / FOLDER, True
        self._retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(TRIES),
            wait=_wait_s,
            sleep=sleep,
            reraise=True,
        )
        self.model: ListedModel = self._retrying(
            find_model, self.url, settings.model, f"--set {section}.model= and"
        )
        self.warnings = memory_warning(self.url, self.model)
        """Effects on a run that is trained at the same time."""
        self.num_asked = self.num_kept = 0
        """Requests that were sent, and requests that the cache answered."""

    def to_dict(self) -> dict[str, Any]:
        """Return server, model and counts as plain data."""
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
        schema: Mapping[str, Any] | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Answer:
        """Answer a chat, from the cache or from the server.

        Args:
            messages: The chat.
            schema: JSON schema of the answer, for servers that know schemas.
            temperature: 0 is greedy.
            seed: Seed of the server's draws.

        Raises:
            HostError: No answer after some tries, or an error that will not pass.
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
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged
            kept = Answer(**json.loads(path.read_text(encoding="utf-8")))
            self.num_kept += 1
            return kept
        self.num_asked += 1
        answer = self._ask(body, schema)
        with contextlib.suppress(OSError):  # the cache cannot be written: ask again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(answer))
        return answer

    def _ask(self, body: dict[str, Any], schema: Mapping[str, Any] | None) -> Answer:
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
        answer = self._post(body)  # if this is refused too, the schema was not the reason
        self._takes_schemas = False
        return answer

    def _post(self, body: dict[str, Any]) -> Answer:
        url = f"{self.url}/v1/chat/completions"
        try:
            return _read(url, self._retrying(ask, url, body, self.settings.timeout_s))
        except HostError as error:
            self._require_model(error)
            tries = self._retrying.statistics["attempt_number"]
            if tries == 1:
                raise
            raise HostError(f"{error.problem} ({tries} tries)", fix=error.fix) from error.__cause__

    def _require_model(self, error: HostError) -> None:
        """Raise if the model that was there is gone."""
        answer = _refused_answer(error)
        if answer is None or answer.status_code != 404:
            return
        try:
            left = [model.name for model in list_models(self.url)]
        except HostError:
            return  # the first error is the better hint
        if self.model.name not in left:
            raise HostError(
                f"{self.url} no longer has the model {self.model.name!r}; it has {', '.join(left)}",
                fix="load it there again, then run the same command again",
            ) from error.__cause__


def _read(url: str, data: Mapping[str, Any]) -> Answer:
    try:
        choice = data["choices"][0]
        text, ended = choice["message"].get("content") or "", choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise HostError(
            f"{url} answers with JSON that is not a chat completion: {json.dumps(data)[:300]}",
            fix="is it a server that speaks the OpenAI protocol?",
        ) from error
    return Answer(redact(_THOUGHT.sub("", str(text))).strip(), ended == "length", now())


def text_schema(**texts: Mapping[str, Any]) -> dict[str, Any]:
    """Build the JSON schema of an object of texts, all of them required.

    Args:
        **texts: Rules of each text beside its type: `enum`, `maxLength`.
    """
    return {
        "type": "object",
        "properties": {name: {"type": "string", **rules} for name, rules in texts.items()},
        "required": list(texts),
        "additionalProperties": False,
    }


def find_object(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """Return the first JSON object in a text that has all of these texts, or None.

    >>> find_object('Sure: {"a": {}} or {"a": "x", "b": 1}', ["a"])
    {'a': 'x'}
    """
    for start in (match.start() for match in re.finditer("{", text)):
        with contextlib.suppress(ValueError, RecursionError):
            value, _ = _DECODER.raw_decode(text, start)
            if all(isinstance(value.get(name), str) for name in names):
                return {name: value[name] for name in names}
    return None
