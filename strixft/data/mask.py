"""Find the characters of a rendered chat that are trained, by rendering, for any chat template.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from strixft.data.completeness import left_out, says, squeezed
from strixft.data.template import ChatTemplate, reasoning_of, shared_length
from strixft.formats.faults import RowFault
from strixft.formats.messages import REASONING, Chat, Message
from strixft.support.errors import DataError

Span = tuple[int, int]
"""Half-open [start, end) in characters."""

Places = dict[int, int]
"""Marker → its place in the plain text. The marker before message i is 2 i, the one after 2 i + 1.
"""

_AREAS = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
"""Private-use characters; markers come from the first area that the chat does not use."""

_MARKERS = [re.compile(f"[{chr(first)}-{chr(last)}]") for first, last in _AREAS]
MOST_ANSWERS = (_AREAS[0][1] - _AREAS[0][0]) // 2

_BEGUN_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
_OPEN_TAG = re.compile(r"(<[^<>\s]+>)\s*$")


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of a row, and the spans of it that are trained."""

    text: str
    spans: list[Span]
    prompt_end: int
    """First character of the last trained answer."""
    request: str
    """Text of the message before that answer."""
    answer: str
    """Text of that answer."""


class Masker:
    """Finds the spans of a chat that are trained.

    Args:
        template: The model's chat template.
        loss_on: `assistant`, `completion` (the last answer) or `all`.
        end_of_text: Written after the last answer where the template ends it with nothing.
        eos: Texts at which the model stops. Where the template ends an answer with nothing, one
            that opens the next turn is the answer's end: `<|user|>` of GLM-4.
        keep_thinking: Reasoning before an answer, and the empty one that a template writes in its
            place, is shown and not trained.

    Raises:
        DataError: Nothing would tell the model to stop.
    """

    def __init__(
        self,
        template: ChatTemplate,
        loss_on: str,
        end_of_text: str = "",
        eos: Sequence[str] = (),
        *,
        keep_thinking: bool = False,
    ) -> None:
        if not template.end_token and not end_of_text:
            raise DataError(
                "the chat template writes nothing after an answer and the tokenizer has no end"
                " token, so the model would not learn to stop",
                fix='"eos_token": "…" in the model\'s tokenizer_config.json',
            )
        self.template = template
        self.loss_on = loss_on
        self._keep_thinking = keep_thinking
        self._end_of_text = "" if template.end_token else end_of_text
        self._ends = template.ends if template.end_token else [*eos, *template.ends]

    def pieces(self, chat: Chat) -> list[Piece]:
        """Return the rows that a chat becomes: one, or more where the template rewrites answers.

        Raises:
            RowFault: The template refuses the chat, leaves something of it out, or hides the place
                of an answer.
        """
        if len(chat.messages) > MOST_ANSWERS:
            raise RowFault("too_many_turns", f"has more than {MOST_ANSWERS} messages")
        form, text = self.template.form_of(chat)
        answers = [i for i, m in enumerate(form.messages) if m["role"] == "assistant"]
        if self.loss_on == "all":
            # the prompt that evaluation gives is that of the last answer all the same
            last = self._pieces(form, text, answers[-1:])[-1]
            if last.text.startswith(text.rstrip()) or answers[-1] == len(form.messages) - 1:
                return [replace(last, spans=[(0, len(last.text))])]
            self._require_all(form, text)
            return [replace(last, text=text, spans=[(0, len(text))], prompt_end=1)]
        wanted = answers[-1:] if self.loss_on == "completion" else answers
        wanted = [i for i in wanted if form.messages[i].get("train", True)]
        if not wanted:
            raise RowFault("nothing_to_train", "the last answer is marked as not to be trained")
        return self._pieces(form, text, wanted)

    def _pieces(self, form: Chat, text: str, wanted: Sequence[int]) -> list[Piece]:
        places = self._places(form, text)
        is_whole = _lacking(form.messages, text, places) is None
        spans: dict[int, Span] = {}
        own: list[Piece] = []
        for index in wanted:
            span = self._in_place(form.messages, index, text, places) if is_whole else None
            if span is None:
                found = self._as_last(form, index)
                if is_whole and text.startswith(found.text):
                    span = found.prompt_end, found.spans[0][1]
                else:
                    own.append(found)
                    continue
            spans[index] = span
        if not spans:
            return own
        last = max(spans)
        if self._end_of_text and not text[spans[last][1] :].strip():
            text = text[: spans[last][1]] + self._end_of_text
            spans[last] = (spans[last][0], len(text))
        begin = spans[last][0]  # where the model begins to write, and so to think
        ordered = [self._trained(form.messages[i], text, spans[i]) for i in sorted(spans)]
        return [Piece(text, ordered, begin, *_exchange(form.messages, last)), *own]

    def _trained(self, message: Message, text: str, span: Span) -> Span:
        """Return what is trained of all that the model writes.

        Raises:
            RowFault: Its reasoning stands behind its calls.
        """
        (start, end), template = span, self.template
        if not self._keep_thinking:
            return span
        thought = (message.get(REASONING[0]) or reasoning_of(message)[0]).strip()
        found = text.find(thought, start, end) if thought else -1
        if found >= 0:
            calls = message.get("tool_calls", ())
            if any(call["function"]["name"] in text[start:found] for call in calls):
                raise RowFault("not_shown", "the chat template shows reasoning after the calls")
            found += len(thought)
            return found + len(template.end_in(text[found:end])), end
        for lead in (frame.lead for frame in template.frames):
            if template.thought_end in lead and text.startswith(lead, start):
                return start + lead.index(template.thought_end) + len(template.thought_end), end
        return span

    def _require_all(self, form: Chat, text: str, *, prompt: bool = False) -> None:
        missing = _lacking(form.messages, text, self._places(form, text, prompt=prompt))
        if missing is not None:
            raise left_out(form.messages, missing)

    def _places(self, form: Chat, text: str, *, prompt: bool = False) -> Places | None:
        """Return the places of the markers of each message; None if they change the text."""
        area = next((i for i, m in enumerate(_MARKERS) if text.isascii() or not m.search(text)), 0)
        first = _AREAS[area][0]
        marked = []
        for number, message in enumerate(form.messages):
            if core := message["content"].strip():  # templates trim: the markers stay inside
                signs = chr(first + 2 * number), chr(first + 2 * number + 1)
                content = message["content"].replace(core, core.join(signs), 1)
                message = {**message, "content": content}
            marked.append(message)
        try:
            found = self.template.render(marked, form.tools, prompt=prompt)
        except RowFault:  # of a template that looks into what is said
            return None
        parts, places, last, length = [], Places(), 0, 0
        for match in _MARKERS[area].finditer(found):
            marker = ord(match[0]) - first
            if marker not in places:  # a second copy stays in the text
                parts.append(found[last : match.start()])
                length += match.start() - last
                places[marker], last = length, match.end()
        return places if "".join([*parts, found[last:]]) == text else None

    def _in_place(
        self, messages: Sequence[Message], index: int, text: str, places: Places | None
    ) -> Span | None:
        """Return the trained span of an answer that the chat shows whole; None otherwise."""
        message = messages[index]
        if index and messages[index - 1]["role"] == "tool":
            return None  # templates may open it in other words than after a question, or not at all
        if places is None or message.get("tool_calls") or REASONING[0] in message:
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
        for end in self._ends:
            for written in (space + end, end):
                if text.startswith(written, closed):
                    return closed + len(written)
        return None

    def _as_last(self, form: Chat, index: int) -> Piece:
        """Return the chat up to an answer, as the model would have seen it, and the answer.

        Raises:
            RowFault: The template leaves something out, or hides the place of the answer.
        """
        message, render = form.messages[index], self.template.render
        asked = replace(form, messages=form.messages[:index])
        upto = replace(form, messages=form.messages[: index + 1])
        prompt = render(asked.messages, form.tools, prompt=True)
        whole = render(upto.messages, form.tools)
        text, places = whole.rstrip(), self._places(upto, whole)
        turn = shared_length(render(asked.messages, form.tools), text)
        hidden = _lacking(upto.messages, whole, places) is not None
        if hidden or not _shows(message, text[turn:]):
            self._require_all(asked, prompt, prompt=True)
            start, text = len(prompt), prompt + self._written(form.messages, index, prompt)
        elif text.startswith(prompt):
            start = len(prompt)
        else:  # its marker shows where it starts, unless the template moves that away
            opened = None if REASONING[0] in message else (places or {}).get(2 * index)
            start = _parting(prompt, text)
            if opened is not None:
                framed = self._start(text, opened, "")
                start = opened if framed is None else framed
        if not self.template.end_token and self._end_of_text:
            text += self._end_of_text
        trained = self._trained(message, text, (start, len(text)))
        return Piece(text, [trained], start, *_exchange(form.messages, index))

    def _written(self, messages: Sequence[Message], index: int, prompt: str) -> str:
        """Return an answer's own words, where the template would leave some of them out."""
        message = messages[index]
        if message.get("tool_calls") or REASONING[0] in message:
            raise left_out(messages, index, "some of ")
        content: str = message["content"].strip()
        tag = _OPEN_TAG.search(prompt)
        if tag and content.startswith(tag[1]):  # the prompt has it already
            content = content[len(tag[1]) :].lstrip()
        lead = self.template.frames[0].lead
        return (lead if lead.isspace() else "") + content + self.template.end_token


def _parting(prompt: str, text: str) -> int:
    """Return the place where a text parts from a prompt; tags that begin alike part as a whole."""
    shared = shared_length(prompt, text)
    tag = _BEGUN_TAG.search(text, 0, shared)
    return tag.start() if tag else shared


def _shows(message: Message, turn: str) -> bool:
    """Check that a rendered turn has all of a message's words, spaces aside."""
    flat = squeezed(turn)
    calls = message.get("tool_calls") or []
    # templates set reasoning and answer apart
    reasoning, tag, answer = message["content"].partition("</think>")
    told = [reasoning.replace("<think>", "") if tag else reasoning, answer]
    told.append(message.get(REASONING[0], ""))
    named = all(call["function"]["name"] in turn for call in calls)
    return named and all(squeezed(part) in flat for part in told)


def _exchange(messages: Sequence[Message], index: int) -> tuple[str, str]:
    """Return the message before an answer, and the answer."""
    return messages[index - 1]["content"] if index else "", messages[index]["content"]


def _lacking(
    messages: Sequence[Message], text: str, places: Mapping[int, int] | None
) -> int | None:
    """Find the first message whose words a rendered chat does not have.

    The reasoning of an answer does not count: templates leave out that of earlier turns.
    """
    for index, message in enumerate(messages):
        reasoning, said = reasoning_of(message)
        if not said.strip():
            continue
        if places is None:
            region = text
        else:
            opened, closed = places.get(2 * index), places.get(2 * index + 1)
            if closed is None or (opened is None and not reasoning):
                return index
            region = text[opened or 0 : closed]
        if not says(region, said):
            return index
    return None
