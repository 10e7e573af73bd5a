"""Refuse chats of which the template leaves something out: messages, calls or functions."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from strixft.data.template import ChatTemplate, reasoning_of
from strixft.formats.faults import RowFault, shown
from strixft.formats.messages import Chat, Message

_FIRST = 0xF0000
"""First of the private-use characters that are put to names and values of calls."""

_NUMBER = 7_316_000_000
"""Numbers of calls become this one and its successors, which no data have."""


def squeezed(text: str) -> str:
    """Return the text without spaces, which templates may trim or add."""
    return "".join(text.split())


def says(text: str, words: str) -> bool:
    """Check that a text has these words: as they are, or escaped as JSON, HTML or Python do."""
    if words.strip() in text:
        return True
    flat = squeezed(text)
    escaped = (
        words,
        json.dumps(words)[1:-1],
        json.dumps(words, ensure_ascii=False)[1:-1],
        html.escape(words),
        repr(words)[1:-1],
    )
    return any(squeezed(one) in flat for one in escaped)


def left_out(messages: Sequence[Message], index: int, part: str = "") -> RowFault:
    """Return the fault of a row of which the chat template leaves out a message, or a part."""
    role = messages[index]["role"]
    problem = f"the chat template leaves out {part}message {index + 1}, the {role}'s"
    said = messages[index]["content"].strip()
    hint = "; name its role 'system' if that is what it is" if role == "developer" else ""
    return RowFault("not_shown", f"{problem}{f': {shown(said)}' if said else ''}{hint}")


def lacking(messages: Sequence[Message], text: str, places: Mapping[int, int] | None) -> int | None:
    """Find the first message whose words a rendered chat does not have.

    The reasoning of an answer does not count: templates leave out that of earlier turns.

    Args:
        messages: Of the chat.
        text: The chat as the template shows it.
        places: Of the markers around each message (`mask.Places`); None if they are not known.
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


def check_tools(tools: Sequence[Mapping[str, Any]] | None, text: str) -> None:
    """Refuse a chat whose functions the template does not show.

    Raises:
        RowFault: It names the function.
    """
    for tool in tools or ():
        function = tool.get("function", tool)
        for name in ("name", "description"):
            value = function.get(name)
            if isinstance(value, str) and not says(text, value):
                raise RowFault(
                    "not_shown",
                    f"the chat template leaves out the {name} of the function"
                    f" {shown(function['name'])} of 'tools'; what it has no place for can be"
                    " written into the system message",
                )


def check_calls(template: ChatTemplate, form: Chat, text: str) -> None:
    """Refuse a form in which the template leaves out a name or a value of a call.

    The chat is rendered with a mark at each of them; each mark must be in what comes out, however
    often the same words occur elsewhere. Arguments must not come out as Python writes them.

    Raises:
        RowFault: It names the call.
    """
    calls = [call for message in form.messages for call in message.get("tool_calls") or ()]
    if not calls:
        return
    for call in calls:
        arguments = call["function"]["arguments"]
        written = repr(arguments)
        if isinstance(arguments, dict) and written in text and json.dumps(arguments) != written:
            name = shown(call["function"]["name"])
            raise RowFault(
                "not_shown", f"the arguments of {name} come out as Python's, not as JSON"
            )
    marks = _Marks()
    messages = [marks.message(message) for message in form.messages]
    try:
        marked = template.render(messages, form.tools)
    except RowFault:  # of a template that looks names up
        marked = None
    for what, plain, mark in marks.made:
        seen = says(text, plain) if marked is None else says(marked, mark)
        if not seen:
            raise RowFault("not_shown", f"the chat template leaves out {what}")


class _Marks:
    """Puts a mark to each name and value of calls."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, str]] = []
        """Name for texts, the value as it is, and its mark."""

    def message(self, message: Message) -> Message:
        if not message.get("tool_calls"):
            return message
        return {**message, "tool_calls": [self._call(call) for call in message["tool_calls"]]}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        name, arguments = function["name"], function["arguments"]
        of = f" of the call of {shown(name)}"
        as_text = isinstance(arguments, str)
        function["name"] = self._text(name, f"the call of {shown(name)}")
        made = self._value(json.loads(arguments) if as_text else arguments, "a value", of)
        function["arguments"] = json.dumps(made, ensure_ascii=False) if as_text else made
        return {**call, "function": function}

    def _text(self, text: str, what: str) -> str:
        mark = chr(_FIRST + len(self.made) % 0xFFFD)
        self.made.append((what, text, mark))
        return text + mark

    def _value(self, value: Any, what: str, of: str) -> Any:
        if isinstance(value, dict):
            return {
                self._text(key, f"the argument {shown(key)}{of}"): self._value(
                    inner, f"the value of {shown(key)}", of
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._value(inner, what, of) for inner in value]
        if isinstance(value, str):
            return self._text(value, what + of)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _NUMBER + len(self.made)
            self.made.append((what + of, json.dumps(value), str(number)))
            return number if isinstance(value, int) else float(number)
        return value  # true, false and null: their key is marked
