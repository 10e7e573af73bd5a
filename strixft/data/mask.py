"""Which tokens of a chat are trained, found by rendering, for any chat template.

The chat is rendered twice: as it is, and with a marker on both sides of each assistant text. Where
both renderings agree but for the markers, the markers show where the template put each answer. An
answer's span runs from the end of the template's generation prompt to the end of its end token,
so what is trained is exactly what the model has to write. Templates that do not let the markers
through are read turn by turn: each turn must then extend the text before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from strixft.errors import DataError
from strixft.formats import Message, RowFault

OPEN, CLOSE = "\ue000", "\ue001"
"""Markers: private-use characters, which text does not contain."""
Span = tuple[int, int]
"""Half-open [start, end) in characters."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One chat as tokens."""

    row: int
    """Line of the source file, from 1."""
    text: str
    """The rendered chat."""
    input_ids: list[int]
    trained: list[bool]
    """Whether each token counts in the loss."""
    prompt_tokens: int
    """Tokens before the last answer."""
    request: str
    """Text of the message before the last answer."""
    answer: str
    """Text of the last answer."""


def _mark(text: str) -> str:
    core = text.strip()  # templates may trim: keep the markers inside what survives
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{OPEN}{core}{CLOSE}{text[start + len(core) :]}"


def _last_exchange(messages: Sequence[Message]) -> tuple[str, str]:
    """The last answer, and the message before it."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[last - 1]["content"] if last else "", messages[last]["content"]


class Encoder:
    """Renders chats with a model's template and turns them into token rows.

    Args:
        tokenizer: A fast tokenizer of transformers with a chat template.
        loss_on: `assistant`, `completion` (the last answer) or `all`.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "assistant") -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                fix="use the model's instruct version",
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        specials = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, reversed(specials))) + ")")
        hello = [{"role": "user", "content": "Hello"}]
        self._generation_prompt = self.render(hello, prompt=True)[len(self.render(hello)) :]

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The chat as the model sees it; with `prompt`, up to where an answer starts.

        Raises:
            RowFault: The template refuses the chat.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what they like
            raise RowFault("template_refuses", f"the chat template refuses it: {error}") from error
        return text

    def _end_of_answer(self, text: str, position: int) -> int:
        match = self._end.match(text, position)
        return match.end() if match else position

    def _marked_spans(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        marked = self.render(
            [
                {**m, "content": _mark(m["content"])} if m["role"] == "assistant" else m
                for m in messages
            ]
        )
        if marked.replace(OPEN, "").replace(CLOSE, "") != text:
            return None
        spans: list[Span] = []
        for number, match in enumerate(re.finditer(f"{OPEN}(.*?){CLOSE}", marked, re.DOTALL)):
            start = match.start() - 2 * number  # two markers went before each earlier answer
            header = text.rfind(self._generation_prompt, 0, start) + len(self._generation_prompt)
            end = self._end_of_answer(text, start + len(match[1]))
            floor = spans[-1][1] if spans else 0
            spans.append((header if self._generation_prompt and header > floor else start, end))
        return spans

    def _turn_spans(self, messages: Sequence[Message], text: str) -> list[Span] | None:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], prompt=True)
            after = self.render(messages[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                return None
            end = len(after.rstrip())
            spans.append((len(before), end))
        return spans

    def spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Where the answers stand in a rendered chat, end tokens included.

        Raises:
            RowFault: There is no answer, or the template hides where it is.
        """
        answers = [m for m in messages if m["role"] == "assistant"]
        if not answers:
            raise RowFault(
                "no_answer", "no message is the assistant's, so there is nothing to train"
            )
        if not answers[-1]["content"].strip():
            raise RowFault("empty_answer", "the last assistant message is empty")
        spans = self._marked_spans(messages, text)
        if not spans:
            spans = self._turn_spans(messages, text)
        if not spans:
            raise RowFault("no_mask", "the chat template hides where the answer stands")
        return spans

    def _trained_spans(self, spans: list[Span], text: str) -> list[Span]:
        if self.loss_on == "all":
            return [(0, len(text))]
        return spans[-1:] if self.loss_on == "completion" else spans

    def encode(
        self, chats: Sequence[tuple[int, Sequence[Message]]]
    ) -> list[TokenRow | tuple[int, RowFault]]:
        """Token rows of many chats, in order; a fault beside the row's number where one fails.

        Args:
            chats: Row number and messages of each.
        """
        rendered: list[tuple[int, str, list[Span], tuple[str, str]] | tuple[int, RowFault]] = []
        for row, messages in chats:
            try:
                text = self.render(messages)
                spans = self.spans(messages, text)
                rendered.append((row, text, spans, _last_exchange(messages)))
            except RowFault as fault:
                rendered.append((row, fault))
        texts = [item[1] for item in rendered if len(item) == 4]
        encoded = iter(self._tokenize(texts))
        return [
            self._token_row(*item, *next(encoded)) if len(item) == 4 else item for item in rendered
        ]

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return list(zip(batch["input_ids"], batch["offset_mapping"], strict=True))

    def _token_row(
        self,
        row: int,
        text: str,
        spans: list[Span],
        exchange: tuple[str, str],
        input_ids: list[int],
        offsets: list[Span],
    ) -> TokenRow:
        trained = [False] * len(input_ids)
        for start, end in self._trained_spans(spans, text):
            for index, (left, right) in enumerate(offsets):
                # a token may begin with the space before the answer: it is written by the model
                left += len(text[left:right]) - len(text[left:right].lstrip())
                trained[index] = trained[index] or start <= min(left, right - 1) < end
        trained[0] = False  # nothing stands before the first token to predict it from
        prompt_tokens = sum(right <= spans[-1][0] for _, right in offsets)
        return TokenRow(row, text, input_ids, trained, prompt_tokens, *exchange)


def trained_runs(trained: Sequence[bool]) -> list[Span]:
    """Half-open ranges of tokens that are trained.

    >>> trained_runs([False, True, True, False, True])
    [(1, 3), (4, 5)]
    """
    edges = [index + 1 for index, (a, b) in enumerate(pairwise([False, *trained, False])) if a != b]
    return [(start - 1, end - 1) for start, end in zip(edges[::2], edges[1::2], strict=True)]
