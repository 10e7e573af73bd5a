"""Render chats with a model's chat template, and learn its texts around an answer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strixft.formats.faults import RowFault
from strixft.formats.messages import REASONING, Chat, Message
from strixft.support.errors import DataError
from strixft.support.private_hf import compile_template

QUESTIONS = ("zquestion one", "zquestion two")
ANSWERS = ("zanswer one", "zanswer two")
"""Texts that the template is tried with; no template writes these words itself."""

_TOOL = {
    "type": "function",
    "function": {
        "name": "zfunction",
        "description": "zdescription",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}

_TAG = re.compile(r"\s*<[^<>\s]{1,40}>")


@dataclass(frozen=True, slots=True)
class Frame:
    """The text before an answer."""

    header: str
    """The end of the prompt that an answer follows."""
    lead: str
    """Text that the template puts between prompt and answer; the model has to write it too."""


def _turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def shared_length(a: str, b: str) -> int:
    """Return the number of characters that two texts begin with together.

    >>> shared_length("template", "tempt")
    4
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _between(text: str, before: str, after: str) -> str:
    start = text.index(before) + len(before)
    return text[start : text.index(after, start)]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        for_tools: Take the one for rows with tools, where there are several (`tool_use`).

    Raises:
        DataError: It has none, or it refuses a question and its answer.
    """

    def __init__(self, tokenizer: Any, *, for_tools: bool = False) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                fix="use the model's instruct version, or data of the format text",
            )
        from jinja2 import meta

        self._name, self._tools = tokenizer.name_or_path, [_TOOL] if for_tools else None
        self._in_parts = False
        self._special_tokens = dict(tokenizer.special_tokens_map)
        try:
            self._source: str = tokenizer.get_chat_template(tools=self._tools)
            self._template = compile_template(self._source)
            parsed = self._template.environment.parse(self._source)
            self.lists_tools = "tools" in meta.find_undeclared_variables(parsed)
            """The template has a place for functions."""
        except Exception as error:  # of the template's syntax, or of several without a default
            raise self._refused(error) from None
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        longest = sorted(added, key=len, reverse=True)
        self.specials = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest)) + ")")
        self._opener = ""
        """Text at the end of every chat, as if an answer were asked for."""
        self._look()

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"the chat template of {self._name} cannot show a question and its answer: {error}",
            fix="use the model's instruct version, or correct its chat_template.jinja",
        )

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False
    ) -> str:
        """Return the chat as the model sees it; with `prompt`, up to the start of an answer.

        Raises:
            RowFault: The template refuses the chat.
        """
        shown = messages
        if self._in_parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text: str = self._template.render(
                messages=shown,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except Exception as error:  # templates raise what they like
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RowFault("template_refuses", f"the chat template refuses it: {first}") from error
        return text if prompt or not self._opener else text.removesuffix(self._opener)

    def _look(self) -> None:
        """Try the template, and note what it writes before and after an answer."""
        try:
            self._look_at()
        except (RowFault, ValueError) as error:
            self._in_parts = True  # as templates of models that see may ask for
            try:
                self._look_at()
            except (RowFault, ValueError):
                raise self._refused(error) from None

    def _look_at(self) -> None:
        question, answer = _turn("user", QUESTIONS[0]), _turn("assistant", ANSWERS[0])
        second = [_turn("user", QUESTIONS[1]), _turn("assistant", ANSWERS[1])]
        prompt = self.render([question], self._tools, prompt=True)
        single = self.render([question, answer], self._tools)
        before = _between(single, QUESTIONS[0], ANSWERS[0])
        written = single[single.index(ANSWERS[0]) + len(ANSWERS[0]) :]
        tail = prompt[prompt.index(QUESTIONS[0]) + len(QUESTIONS[0]) :]
        plain = self.render([question], self._tools)
        if plain == prompt and written.endswith(tail):  # it does not heed add_generation_prompt
            self._opener = self._opened_after(written)
            written = written.removesuffix(self._opener)
        self.end_token = written.rstrip()
        """Text that the template writes after the last answer; may be empty."""
        closed = len(tail) - len(prompt[len(plain) :]) if prompt.startswith(plain) else 0
        closed = closed if closed < len(tail) else 0  # nothing opens a turn of the assistant
        self.frames = [self._frame(before, tail, closed)]
        self.ends = [self.end_token]
        with contextlib.suppress(RowFault, ValueError):  # one answer may be all that it takes
            double = self.render([question, answer, *second], self._tools)
            self._look_at_first(double, tail, closed)

    def _opened_after(self, written: str) -> str:
        match = self.specials.match(written) or _TAG.match(written)
        return written[match.end() :] if match else written

    def _frame(self, before: str, tail: str, closed: int) -> Frame:
        """Return the text before an answer: the prompt, or, where that differs, all of it."""
        if before.startswith(tail):
            return Frame(tail[closed:], before[len(tail) :])
        return Frame(before[closed:] or before, "")

    def _look_at_first(self, double: str, tail: str, closed: int) -> None:
        """Note the texts around an answer that is not the last, where they are others."""
        before = _between(double, QUESTIONS[0], ANSWERS[0])
        after = _between(double, ANSWERS[0], QUESTIONS[1])
        frame = self._frame(before, tail, closed)
        self.frames += [] if frame in self.frames else [frame]
        if not self.end_token:  # what follows may be an end token, or only open the next turn
            opened = shared_length(after[::-1], double[: double.index(QUESTIONS[0])][::-1])
            self.ends = [after[: len(after) - opened].rstrip(), ""]
        elif not after.startswith(self.end_token):
            match = self.specials.match(after) or _TAG.match(after)
            self.ends.append(match[0] if match else "")

    def writes_as_text(self, chat: Chat) -> bool:
        """Check that the chat has functions or calls, and the template no place for them."""
        calls = "tool_calls" not in self._source and any(
            message.get("tool_calls") for message in chat.messages
        )
        return not self.lists_tools and (chat.tools is not None or calls)

    def forms(self, chat: Chat) -> Iterator[Chat]:
        """Yield the forms in which the template may take a chat, the best first.

        Reasoning is given in a key of its own, or in tags before the answer; arguments of calls as
        data, or as JSON text. Only where the template has no place for functions are they and
        their calls written out as text.
        """
        if self.writes_as_text(chat):
            chat = replace(chat, messages=tools_as_text(chat.messages, chat.tools), tools=None)
        apart = [with_reasoning_apart(message) for message in chat.messages]
        has_reasoning = any(REASONING[0] in message for message in apart)
        takes_it = has_reasoning and any(name in self._source for name in REASONING)
        for messages in ([apart] if takes_it else []) + [chat.messages]:
            yield replace(chat, messages=messages)
            if any("tool_calls" in message for message in messages):
                yield replace(chat, messages=[_calls_as_text(message) for message in messages])


def written_ends(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer's chat templates write after the last answer."""
    if not tokenizer.chat_template:
        return []
    found = [ChatTemplate(tokenizer).end_token]
    if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
        with contextlib.suppress(DataError):  # rows with tools are refused then
            found.append(ChatTemplate(tokenizer, for_tools=True).end_token)
    return found


def reasoning_of(message: Message) -> tuple[str, str]:
    """Return the reasoning in tags before an answer, and the answer itself.

    >>> reasoning_of({"role": "assistant", "content": "<think>a</think>b"})
    ('a', 'b')
    """
    content: str = message["content"]
    if message["role"] != "assistant" or "</think>" not in content:
        return "", content
    reasoning, _, answer = content.partition("</think>")
    return reasoning.strip().removeprefix("<think>").strip(), answer.lstrip()


def with_reasoning_apart(message: Message) -> Message:
    """Return an answer with its reasoning, if it has any, in keys of its own."""
    reasoning, answer = reasoning_of(message)
    if not reasoning:
        return message
    return {**message, "content": answer, **dict.fromkeys(REASONING, reasoning)}


def _calls_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _written_call(call: Mapping[str, Any]) -> str:
    function = {key: call["function"][key] for key in ("name", "arguments")}
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _written_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n{listed}\nTo call one, write\n<tool_call>\n"
        '{"name": …, "arguments": {…}}\n</tool_call>'
    )


def tools_as_text(messages: Sequence[Message], tools: Any) -> list[Message]:
    """Return the messages of a chat with tools for a template that knows none.

    Functions are listed in the system message, calls are written in the answer, and results come
    back in a turn of the user.
    """
    made: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if "tool_calls" in message:
            written = map(_written_call, message["tool_calls"])
            content = "\n".join([*filter(None, [content]), *written])
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if made and made[-1]["role"] == role == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n{content}"}
        else:
            kept = {"train": message["train"]} if "train" in message else {}
            made.append({"role": role, "content": content, **kept})
    if not tools:
        return made
    if made[0]["role"] == "system":
        first = {**made[0], "content": f"{made[0]['content']}\n\n{_written_tools(tools)}"}
        return [first, *made[1:]]
    return [_turn("system", _written_tools(tools)), *made]
