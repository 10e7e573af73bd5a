"""A model's chat template: it renders chats, and shows what it writes around an answer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strixft.errors import DataError
from strixft.formats import Message, RowFault

QUESTIONS = ("zquestion one", "zquestion two")
ANSWERS = ("zanswer one", "zanswer two")
"""What the template is tried with; words that no template writes itself."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "zfunction",
        "description": "zdescription",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
_CALL = {"id": "zcall00001", "type": "function"}


_TAG = re.compile(r"\s*<[^<>\s]{1,40}>")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates look for reasoning that does not stand in the content."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before an answer."""

    header: str
    """The end of the prompt that an answer follows."""
    lead: str
    """What the template puts between prompt and answer, which the model has to write too."""


def _turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def shared_length(a: str, b: str) -> int:
    """Characters that two texts begin with together.

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

    Raises:
        DataError: It has none, or it refuses a question and its answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                fix="use the model's instruct version, or data of the format text",
            )
        self._tokenizer = tokenizer
        try:
            self._render = self._compiled() or self._slowly
        except Exception as error:  # of the template's syntax
            raise self._refused(error) from None
        self.specials = re.compile(r"\s*(?:" + "|".join(map(re.escape, _longest(tokenizer))) + ")")
        self._look()
        self.call_style = self._tool_style()
        """How the template takes arguments of calls: data or text; None if it knows no tools."""
        self.reasoning_apart = self._wants_reasoning_apart()
        """The template takes reasoning in a key of its own, and not in the content."""

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"the chat template of {self._tokenizer.name_or_path} cannot show a question and its"
            f" answer: {error}",
            fix="use the model's instruct version, or correct its chat_template.jinja",
        )

    def _slowly(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def _compiled(self) -> Callable[[Sequence[Message], Any, bool], str] | None:
        """The template compiled once; transformers prepares each call anew, which takes longer."""
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template
        except ImportError:
            return None
        template = _compile_jinja_template(self._tokenizer.get_chat_template())
        specials = dict(self._tokenizer.special_tokens_map)

        def render(messages: Sequence[Message], tools: Any, prompt: bool) -> str:
            text: str = template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **specials,
            )
            return text

        return render

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False
    ) -> str:
        """The chat as the model sees it; with `prompt`, up to where an answer starts.

        Raises:
            RowFault: The template refuses the chat.
        """
        try:
            return self._render(messages, tools, prompt)
        except Exception as error:  # templates raise what they like
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RowFault("template_refuses", f"the chat template refuses it: {first}") from error

    def _look(self) -> None:
        """Try the template, and note what it writes before and after an answer."""
        question, answer = _turn("user", QUESTIONS[0]), _turn("assistant", ANSWERS[0])
        second = [_turn("user", QUESTIONS[1]), _turn("assistant", ANSWERS[1])]
        try:
            prompt = self.render([question], prompt=True)
            single = self.render([question, answer])
            before = _between(single, QUESTIONS[0], ANSWERS[0])
        except (RowFault, ValueError) as error:
            raise self._refused(error) from None
        self.end_token = single[single.index(ANSWERS[0]) + len(ANSWERS[0]) :].rstrip()
        """What the template writes after the last answer; empty if nothing."""
        tail = prompt[prompt.index(QUESTIONS[0]) + len(QUESTIONS[0]) :]
        plain = self.render([question])
        closed = len(tail) - len(prompt[len(plain) :]) if prompt.startswith(plain) else 0
        closed = closed if closed < len(tail) else 0  # nothing opens a turn of the assistant
        self.follows_prompt = before.startswith(tail)
        """Answers stand after the very prompt that the model will be given."""
        self.frames = [self._frame(before, tail, closed)]
        self.ends = [self.end_token]
        with contextlib.suppress(RowFault, ValueError):  # one answer may be all that it takes
            self._look_at_first(self.render([question, answer, *second]), tail, closed)

    def _frame(self, before: str, tail: str, closed: int) -> Frame:
        """What stands before an answer: the prompt, or, where that differs, all of it."""
        if before.startswith(tail):
            return Frame(tail[closed:], before[len(tail) :])
        return Frame(before[closed:] or before, "")

    def _look_at_first(self, double: str, tail: str, closed: int) -> None:
        """An answer that is not the last may stand in other words."""
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

    def _tool_style(self) -> str | None:
        for style in ("data", "text"):
            arguments: Any = {"place": "zplace"}
            function = {
                "name": "zfunction",
                "arguments": arguments if style == "data" else json.dumps(arguments),
            }
            chat = [
                _turn("user", QUESTIONS[0]),
                _turn("assistant", "", tool_calls=[{**_CALL, "function": function}]),
                _turn("tool", "zresult", tool_call_id=_CALL["id"], name="zfunction"),
                _turn("assistant", ANSWERS[0]),
            ]
            try:
                text = self.render(chat, [_TOOL])
            except RowFault:
                continue
            if all(word in text for word in ("zdescription", "zplace", "zresult", ANSWERS[0])):
                return style
        return None

    def _wants_reasoning_apart(self) -> bool:
        inside = _turn("assistant", f"<think>\nzreason\n</think>\n\n{ANSWERS[0]}")
        question = _turn("user", QUESTIONS[0])
        try:
            apart = self.render([question, with_reasoning_apart(inside)])
            within = self.render([question, inside])
        except RowFault:
            return False
        return "zreason" in apart and within.count("</think>") > apart.count("</think>")

    def adapted(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """A chat as this template takes it: calls as data or text, or all of it as plain turns."""
        if self.reasoning_apart:
            messages = [with_reasoning_apart(message) for message in messages]
        if tools is None and not any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            return list(messages), None
        if self.call_style is None:
            return tools_as_text(messages, tools), None
        if self.call_style == "data":
            return list(messages), tools
        return [_calls_as_text(message) for message in messages], tools


def _longest(tokenizer: Any) -> list[str]:
    """Special and added tokens, longest first."""
    return sorted(
        {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
    )


def with_reasoning_apart(message: Message) -> Message:
    """An answer whose reasoning stands in a key of its own, if it has any.

    >>> with_reasoning_apart({"role": "assistant", "content": "<think>a</think>b"})["content"]
    'b'
    """
    if message["role"] != "assistant" or "</think>" not in message["content"]:
        return message
    reasoning, _, answer = message["content"].partition("</think>")
    apart = reasoning.strip().removeprefix("<think>").strip()
    return {**message, "content": answer.lstrip(), **dict.fromkeys(REASONING, apart)}


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
    """A chat with tools for a template that knows none.

    Functions are listed in the system message, calls are written in the answer, and results come
    back in a turn of the user.
    """
    made: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if "tool_calls" in message:
            content = "\n".join([*filter(None, [content]), *map(_written_call, _calls(message))])
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


def _calls(message: Message) -> list[Mapping[str, Any]]:
    calls: list[Mapping[str, Any]] = message["tool_calls"]
    return calls
