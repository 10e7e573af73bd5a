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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt

from strixft.completions.models import Listed, find_model, is_local, list_models, memory_warning
from strixft.completions.retries import TRIES, is_refusal, may_pass, status_of, wait_s
from strixft.errors import HostError
from strixft.formats import Message
from strixft.recipe import Server
from strixft.runs import now, write_json
from strixft.servers import ask
from strixft.text import redact

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
