"""Render chats with a model's chat template; learn its texts around an answer.

Nothing that a chat says may be missing in what its template shows: `ChatTemplate.form_of` tries the
forms in which a template may take reasoning, calls and functions, and else refuses the chat.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strixft.data.completeness import check_calls, check_tools, left_out, squeezed
from strixft.formats.faults import RowFault
from strixft.formats.messages import END_OF_REASONING, REASONING, RESERVED, Chat, Message
from strixft.support.errors import DataError
from strixft.support.private_hf import compile_template

QUESTIONS, THOUGHT = ("zquestion one", "zquestion two"), "zthought"
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
        kwargs: Variables of the template, such as `enable_thinking`.

    Raises:
        DataError: It has none, it refuses a question and its answer, or it does not read a
            variable.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        for_tools: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                fix="use the model's instruct version, or data of the format text",
            )
        from jinja2 import meta

        self._name, self._tools = tokenizer.name_or_path, [_TOOL] if for_tools else None
        self._in_parts = False
        self._variables = {**tokenizer.special_tokens_map, **(kwargs or {})}
        try:
            self._source: str = tokenizer.get_chat_template(tools=self._tools)
            self._template = compile_template(self._source)
            parsed = self._template.environment.parse(self._source)
            self.shows_reasoning = any(name in self._source for name in (*REASONING, "<think>"))
            """The template has a place for reasoning."""
            self.lists_tools = "tools" in meta.find_undeclared_variables(parsed)
            """The template has a place for functions."""
        except Exception as error:  # of the template's syntax, or of several without a default
            raise self._refused(error) from None
        if unread := next((name for name in kwargs or {} if not self.reads(name)), None):
            raise DataError(
                f"the chat template of {self._name} does not read {unread!r}",
                fix=f"leave {unread} out of dataset.chat_template_kwargs",
            )
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        longest = sorted(added, key=len, reverse=True)
        self.specials = re.compile(r"\s*(?:" + "|".join(map(re.escape, longest)) + ")")
        self._opener = ""
        """Text at the end of every chat, as if an answer were asked for."""
        try:
            self._look()
        except (RowFault, ValueError) as error:
            self._in_parts = True  # as templates of models that see may ask for
            try:
                self._look()
            except (RowFault, ValueError):
                raise self._refused(error) from None
        self.thought_end = self._look_for_thought_end()

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"the chat template of {self._name} cannot show a question and its answer: {error}",
            fix="use the model's instruct version, or correct its chat_template.jinja",
        )

    def reads(self, name: str) -> bool:
        """Check that the template has a variable of this name that a row may set."""
        return (
            name not in RESERVED and re.search(rf"\b{re.escape(name)}\b", self._source) is not None
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
                **self._variables,
            )
        except Exception as error:  # templates raise what they like
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RowFault("template_refuses", f"the chat template refuses it: {first}") from error
        return text if prompt or not self._opener else text.removesuffix(self._opener)

    def _look(self) -> None:
        """Try the template, and note what it writes before and after an answer."""
        question, answer = _turn("user", QUESTIONS[0]), _turn("assistant", ANSWERS[0])
        second = [_turn("user", QUESTIONS[1]), _turn("assistant", ANSWERS[1])]
        prompt = self.render([question], self._tools, prompt=True)
        single = self.render([question, answer], self._tools)
        before = _between(single, QUESTIONS[0], ANSWERS[0])
        written = single[single.index(ANSWERS[0]) + len(ANSWERS[0]) :]
        tail = prompt[prompt.index(QUESTIONS[0]) + len(QUESTIONS[0]) :]
        plain = self.render([question], self._tools)
        if plain == prompt and written.endswith(tail):  # it does not heed add_generation_prompt
            self._opener = written.removeprefix(self.end_in(written))
            written = written.removesuffix(self._opener)
        self.end_token = written.rstrip()
        """Text that the template writes after the last answer; may be empty."""
        closed = len(tail) - len(prompt[len(plain) :]) if prompt.startswith(plain) else 0
        closed = closed if closed < len(tail) else 0  # nothing opens a turn of the assistant

        def frame(before: str) -> Frame:
            """Return the text before an answer: the prompt, or, where that differs, all of it."""
            if before.startswith(tail):
                return Frame(tail[closed:], before[len(tail) :])
            return Frame(before[closed:] or before, "")

        self.frames = [frame(before)]
        self.ends = [self.end_token]
        with contextlib.suppress(RowFault, ValueError):  # one answer may be all that it takes
            double = self.render([question, answer, *second], self._tools)
            # an answer that is not the last may stand between other texts
            first = frame(_between(double, QUESTIONS[0], ANSWERS[0]))
            after = _between(double, ANSWERS[0], QUESTIONS[1])
            self.frames += [] if first in self.frames else [first]
            if not self.end_token:  # what follows may be an end token, or open the next turn
                opened = shared_length(after[::-1], double[: double.index(QUESTIONS[0])][::-1])
                self.ends = [after[: len(after) - opened].rstrip(), ""]
            elif not after.startswith(self.end_token):
                self.ends.append(self.end_in(after))

    def _look_for_thought_end(self) -> str:
        """Return the text that ends reasoning: `</think>`, or `<|end|>` of gpt-oss' channels."""
        question, answer = _turn("user", QUESTIONS[0]), _turn("assistant", ANSWERS[0])
        thinking = {**answer, **dict.fromkeys(REASONING, THOUGHT)}
        with contextlib.suppress(RowFault):
            _, shown, after = self.render([question, thinking], self._tools).partition(THOUGHT)
            if shown and ANSWERS[0] in after:
                return self.end_in(after).strip()
        return END_OF_REASONING

    def end_in(self, text: str) -> str:
        """Return the first token or tag of a text, where it begins with one."""
        match = self.specials.match(text) or _TAG.match(text)
        return match[0] if match else ""

    def writes_as_text(self, chat: Chat) -> bool:
        """Check that the chat has functions or calls, and the template no place for them."""
        calls = "tool_calls" not in self._source and any(
            message.get("tool_calls") for message in chat.messages
        )
        return not self.lists_tools and (chat.tools is not None or calls)

    def form_of(self, chat: Chat) -> tuple[Chat, str]:
        """Return the first form in which all of a chat is shown, and its text.

        Reasoning is given in a key of its own, or in tags before the answer; arguments of calls as
        data, or as JSON text. Only where the template has no place for functions are they and
        their calls written out as text.

        Raises:
            RowFault: The template refuses the chat, or leaves something of it out.
        """
        if self.writes_as_text(chat):
            chat = replace(chat, messages=tools_as_text(chat.messages, chat.tools), tools=None)
        apart = list(map(_with_reasoning_apart, chat.messages))
        has_reasoning = any(REASONING[0] in message for message in apart)
        takes_it = has_reasoning and any(name in self._source for name in REASONING)
        forms = [apart, chat.messages] if takes_it else [chat.messages]
        if any("tool_calls" in message for message in chat.messages):
            forms = [form for one in forms for form in (one, list(map(_calls_as_text, one)))]
        fault: RowFault | None = None
        for form in (replace(chat, messages=messages) for messages in forms):
            try:
                text = self.render(form.messages, form.tools)
                check_tools(form.tools, text)
                check_calls(self.render, form, text)
                self._check_reasoning(form)
            except RowFault as one:
                fault = one if fault is None or fault.kind == "template_refuses" else fault
            else:
                return form, text
        assert fault is not None
        raise fault

    def _check_reasoning(self, form: Chat) -> None:
        """Refuse a form whose keys for reasoning the template does not read."""
        last = max((i for i, m in enumerate(form.messages) if REASONING[0] in m), default=None)
        if last is None:
            return
        text = self.render(form.messages[: last + 1], form.tools)
        before = self.render(form.messages[:last], form.tools) if last else ""
        turn = text[shared_length(before, text) :]
        if squeezed(form.messages[last][REASONING[0]]) not in squeezed(turn):
            raise left_out(form.messages, last, "the reasoning of ")


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


def has_reasoning(chat: Chat) -> bool:
    """Check that an answer of a chat has reasoning before it."""
    return any(reasoning_of(message)[0] for message in chat.messages)


def without_reasoning(chat: Chat) -> Chat:
    """Return a chat whose answers have no reasoning before them."""

    def bare(messages: Sequence[Message]) -> list[Message]:
        return [{**one, "content": reasoning_of(one)[1]} for one in messages]

    rejected = None if chat.rejected is None else bare(chat.rejected)
    return replace(chat, messages=bare(chat.messages), rejected=rejected)


def _with_reasoning_apart(message: Message) -> Message:
    reasoning, answer = reasoning_of(message)
    if not reasoning:
        return message
    return {**message, "content": answer, **dict.fromkeys(REASONING, reasoning)}


def _calls_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def tools_as_text(messages: Sequence[Message], tools: Any) -> list[Message]:
    """Return the messages of a chat with tools for a template that knows none.

    Functions are listed in the system message, calls are written in the answer, and results come
    back in a turn of the user.
    """
    made: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [content] if content else []
        for call in (one["function"] for one in message.get("tool_calls", ())):
            said = json.dumps({key: call[key] for key in ("name", "arguments")}, ensure_ascii=False)
            parts.append(f"<tool_call>\n{said}\n</tool_call>")
        content = "\n".join(parts)
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if made and made[-1]["role"] == role == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n{content}"}
        else:
            kept = {"train": message["train"]} if "train" in message else {}
            made.append({"role": role, "content": content, **kept})
    if not tools:
        return made
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = (
        f"You can call these functions:\n{listed}\nTo call one, write\n<tool_call>\n"
        '{"name": …, "arguments": {…}}\n</tool_call>'
    )
    if made[0]["role"] == "system":
        return [{**made[0], "content": f"{made[0]['content']}\n\n{told}"}, *made[1:]]
    return [_turn("system", told), *made]
