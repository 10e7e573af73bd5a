"""Which characters of a rendered chat are trained, found by rendering, for any chat template.

The chat is rendered twice: as it is, and with a marker on both sides of each answer. Where both
renderings agree but for the markers, the markers show where the template put each answer. What is
trained runs from the end of the prompt that the model would be given to the end of the answer's
end token: exactly what the model has to write.

Some templates rewrite an answer: they leave out the reasoning of earlier turns, or of all of them.
Such an answer is not trained in its mutilated form. It gets a row of its own: the chat up to it, as
the model would have seen it, and then the whole answer. So does an answer whose chat, rendered
whole, lacks the system message that the prompt would have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.data.template import REASONING, ChatTemplate, shared_length
from strixft.formats import Message, RowFault

Span = tuple[int, int]
"""Half-open [start, end) in characters."""
Places = dict[int, int]
"""Where a marker stands in the plain text: twice the message's index, and one more for the end."""

_AREAS = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
"""Private-use characters; markers come from the first area that the chat does not use."""
_MARKERS = [re.compile(f"[{chr(first)}-{chr(last)}]") for first, last in _AREAS]
MOST_ANSWERS = (_AREAS[0][1] - _AREAS[0][0]) // 2
_OPEN_TAG = re.compile(r"(<[^<>\s]+>)\s*$")


@dataclass(frozen=True, slots=True)
class Piece:
    """One row to be: a text, and what of it is trained."""

    text: str
    spans: list[Span]
    prompt_end: int
    """Where the last trained answer starts."""
    request: str
    """Text of the message before that answer."""
    answer: str
    """Text of that answer."""


def squeezed(text: str) -> str:
    """The text without spaces, which templates may trim or add."""
    return "".join(text.split())


def _mark(text: str, first: int) -> str:
    core = text.strip()  # templates may trim: keep the markers inside what survives
    start = text.index(core)
    return f"{text[:start]}{chr(first)}{core}{chr(first + 1)}{text[start + len(core) :]}"


def _marked(messages: Sequence[Message], first: int) -> list[Message]:
    return [
        {**m, "content": _mark(m["content"], first + 2 * i)}
        if m["role"] == "assistant" and m["content"].strip()
        else m
        for i, m in enumerate(messages)
    ]


def _unmark(text: str, first: int, answers: Sequence[int]) -> tuple[str, Places]:
    """A text without its markers, and where in it each of them stood, if it stands there once."""
    markers = [chr(first + 2 * answer + side) for answer in answers for side in (0, 1)]
    found = sorted((text.find(marker), ord(marker) - first) for marker in markers)
    found = [row for row in found if row[0] >= 0]
    parts, places, last = [], Places(), 0
    for count, (place, marker) in enumerate(found):
        parts.append(text[last:place])
        places[marker] = place - count
        last = place + 1
    return "".join([*parts, text[last:]]), places


class Masker:
    """Finds what is trained of a chat.

    Args:
        template: The model's chat template.
        loss_on: `assistant`, `completion` (the last answer) or `all`.
        end_of_text: Written after the last answer where the template ends it with nothing.
    """

    def __init__(self, template: ChatTemplate, loss_on: str, end_of_text: str = "") -> None:
        self.template = template
        self.loss_on = loss_on
        self._end_of_text = "" if template.end_token else end_of_text

    def pieces(self, messages: Sequence[Message], tools: Any = None) -> list[Piece]:
        """The rows that a chat becomes: one, or more where the template rewrites answers.

        Raises:
            RowFault: The template refuses the chat, or hides where its answers stand.
        """
        messages, tools = self.template.adapted(messages, tools)
        text = self.template.render(messages, tools)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(messages) > MOST_ANSWERS:
            raise RowFault("too_many_turns", f"has more than {MOST_ANSWERS} messages")
        if self.loss_on == "all":
            # the prompt that evaluation gives is that of the last answer all the same
            last = self._pieces(messages, tools, text, answers[-1:])[-1]
            inside = last.text == text
            piece = Piece(text, [(0, len(text))], last.prompt_end, last.request, last.answer)
            return [piece if inside else Piece(text, piece.spans, 1, piece.request, piece.answer)]
        wanted = answers[-1:] if self.loss_on == "completion" else answers
        wanted = [i for i in wanted if messages[i].get("train", True)]
        if not wanted:
            raise RowFault("nothing_to_train", "the last answer is marked as not to be trained")
        return self._pieces(messages, tools, text, wanted)

    def _pieces(
        self, messages: Sequence[Message], tools: Any, text: str, wanted: Sequence[int]
    ) -> list[Piece]:
        places = None if hides_system(messages, text) else self._places(messages, tools, text)
        spans: dict[int, Span] = {}
        own: list[Piece] = []
        for index in wanted:
            span = self._in_place(messages[index], index, text, places)
            if span is None:
                found = self._as_last(messages, tools, index)
                if text.startswith(found.text):
                    span = found.spans[0]
                else:
                    own.append(found)
                    continue
            spans[index] = span
        shared = [self._shared(messages, text, spans)] if spans else []
        return [*shared, *own]

    def _shared(self, messages: Sequence[Message], text: str, spans: dict[int, Span]) -> Piece:
        last = max(spans)
        ordered = [spans[index] for index in sorted(spans)]
        if self._end_of_text and not text[ordered[-1][1] :].strip():
            text = text[: ordered[-1][1]] + self._end_of_text
            ordered[-1] = (ordered[-1][0], len(text))
        return Piece(text, ordered, ordered[-1][0], *_exchange(messages, last))

    def _places(self, messages: Sequence[Message], tools: Any, text: str) -> Places | None:
        """Where the markers of each answer stand in the plain text; None if they change it."""
        area = next((i for i, m in enumerate(_MARKERS) if text.isascii() or not m.search(text)), 0)
        first = _AREAS[area][0]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        marked = self.template.render(_marked(messages, first), tools)
        plain, places = _unmark(marked, first, answers)
        return places if plain == text else None  # a marker that stands twice is still in `plain`

    def _in_place(
        self, message: Message, index: int, text: str, places: Places | None
    ) -> Span | None:
        """What is trained of an answer where it stands whole in the chat; None otherwise."""
        if places is None or "tool_calls" in message or REASONING[0] in message:
            return None
        opened, closed = places.get(2 * index), places.get(2 * index + 1)
        content: str = message["content"]
        core = content.strip()
        if opened is None or closed is None or text[opened:closed] != core:
            return None
        start = self._start(text, opened, content[: content.index(core[0])])
        end = self._end(text, closed, content[len(content.rstrip()) :])
        return None if start is None or end is None else (start, end)

    def _start(self, text: str, opened: int, space: str) -> int | None:
        for before in (opened - len(space), opened):
            for frame in self.template.frames:
                if text.endswith(frame.header + frame.lead, 0, before):
                    return before - len(frame.lead)
        return None

    def _end(self, text: str, closed: int, space: str) -> int | None:
        for end in self.template.ends:
            for written in (space + end, end):
                if text.startswith(written, closed):
                    return closed + len(written)
        return None

    def _as_last(self, messages: Sequence[Message], tools: Any, index: int) -> Piece:
        """The chat up to an answer, as the model would have seen it, and the answer.

        Raises:
            RowFault: The template hides where the answer stands.
        """
        message = messages[index]
        prompt = self.template.render(messages[:index], tools, prompt=True)
        text = self.template.render(messages[: index + 1], tools).rstrip()
        turn = shared_length(self.template.render(messages[:index], tools), text)
        hidden = hides_system(messages, text) and not hides_system(messages, prompt)
        if hidden or not _shows(message, text[turn:]):
            start, text = len(prompt), prompt + self._written(message, prompt)
        elif text.startswith(prompt):
            start = len(prompt)
        else:
            start = self._opened(messages, tools, index, text, prompt)
        if not self.template.end_token and self._end_of_text:
            text += self._end_of_text
        return Piece(text, [(start, len(text))], start, *_exchange(messages, index))

    def _written(self, message: Message, prompt: str) -> str:
        """An answer in the model's own words, where the template would leave some of them out."""
        if "tool_calls" in message:
            raise RowFault("no_mask", "the chat template hides the call of an answer")
        content: str = message["content"].strip()
        tag = _OPEN_TAG.search(prompt)
        if tag and content.startswith(tag[1]):  # the prompt has it already
            content = content[len(tag[1]) :].lstrip()
        lead = self.template.frames[0].lead
        return (lead if lead.isspace() else "") + content + self.template.end_token

    def _opened(
        self, messages: Sequence[Message], tools: Any, index: int, text: str, prompt: str
    ) -> int:
        """Where an answer starts that does not follow the prompt: its marker shows it.

        Where the template moves the marker away, it is where prompt and chat part.
        """
        upto = messages[: index + 1]
        places = self._places(upto, tools, self.template.render(upto, tools))
        opened = (places or {}).get(2 * index)
        return shared_length(prompt, text) if opened is None else opened


def hides_system(messages: Sequence[Message], text: str) -> bool:
    """A rendered chat does not have the system message's words, spaces aside."""
    if not messages or messages[0]["role"] != "system":
        return False
    system: str = messages[0]["content"].strip()
    return system not in text and squeezed(system) not in squeezed(text)


def _shows(message: Message, turn: str) -> bool:
    """A rendered turn has all of a message's words, spaces aside."""
    flat = squeezed(turn)
    calls = message.get("tool_calls", [])
    named = all(call["function"]["name"] in turn for call in calls)
    return named and all(part in flat for part in _told(message))


def _told(message: Message) -> Iterator[str]:
    """A message in one part, or its reasoning and its answer, which templates set apart."""
    reasoning, tag, answer = message["content"].partition("</think>")
    yield squeezed(reasoning.replace("<think>", "") if tag else message["content"])
    yield squeezed(answer)
    yield squeezed(message.get(REASONING[0], ""))


def _exchange(messages: Sequence[Message], index: int) -> tuple[str, str]:
    """An answer, and the message before it."""
    return messages[index - 1]["content"] if index else "", messages[index]["content"]
