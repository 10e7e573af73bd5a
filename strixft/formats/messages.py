"""Messages: the roles, the tool calls and the flags of all the usual chat formats, as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role`, `content` (text) and, where the row has them, `tool_calls`, `tool_call_id`, `name`;
`train: False` on an answer that is shown and not trained."""
Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of the OpenAI chat format, which chat templates are written for."""

OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""ShareGPT's names for them."""
_ROLE_OF = {**{role: role for role in ROLES}, **OTHER_NAMES}

FLAGS = ("train", "weight", "loss_weight", "loss")
"""Names under which data say whether an answer is trained: axolotl, OpenAI, and others."""
_EXTRAS = ("tool_call_id", "name")


class RowFault(Exception):
    """One row is not what its format says. The caller knows the file and the row.

    Args:
        kind: A short name that rows of the same fault share, such as `unknown_role`.
        problem: What is wrong in this row.
    """

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind
        self.problem = problem

    def __reduce__(self) -> tuple[type[RowFault], tuple[str, str]]:
        return RowFault, (self.kind, self.problem)


@dataclass(frozen=True, slots=True)
class Chat:
    """What one row says."""

    messages: list[Message]
    """Empty where the row is plain text."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call, as JSON schemas."""
    text: str | None = None
    """Plain text, trained whole."""
    rejected: list[Message] | None = None
    """The chat with the answer that was not preferred."""
    label: bool | None = None
    """Thumbs up or down."""


def shown(value: object, length: int = 60) -> str:
    """A value from data as it may stand in a message: escaped and cut.

    >>> shown("a" * 99, 8), shown({"a": 1})
    ("'aaaaaaa…", "{'a': 1}")
    """
    try:
        text = repr(value[:length] if isinstance(value, str) else value)
    except RecursionError:
        return f"{type(value).__name__} (nested too deeply to show)"
    whole = len(text) <= length and not (isinstance(value, str) and len(value) > length)
    return text if whole else f"{text[:length]}…"


def as_text(value: object, what: str) -> str:
    """The value, if it is text that can be written as UTF-8.

    Raises:
        RowFault: It is missing or something else.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # JSON allows it, tokenizers do not
                raise RowFault(
                    "not_unicode",
                    f"{what} has half a character at place {error.start}: {error.reason}",
                ) from None
        return value
    if value is None:
        raise RowFault("no_text", f"{what} is missing or null")
    raise RowFault(
        "not_text", f"{what} should be text, it is {type(value).__name__}: {shown(value)}"
    )


def parse_json(text: str, kind: str, what: str) -> Any:
    """JSON that stands as text inside a row.

    Raises:
        RowFault: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(kind, f"{what} is not JSON ({error}): {shown(text)}") from None


def _parts(parts: list[Any], what: str) -> str:
    """Content parts: all text, joined."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and kind in ("text", None) and "text" in part:
            texts.append(as_text(part["text"], f"a part of the {what}"))
        else:
            name = shown(kind if kind is not None else part)
            raise RowFault("not_text", f"{what} has a part of type {name}; only text is trained")
    return "".join(texts)


def _content(message: Row, what: str) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = _parts(content, what)
    if content is None and message.get("tool_calls"):
        content = ""
    reasoning = message.get("reasoning_content")
    content = as_text(content, what)
    if isinstance(reasoning, str) and reasoning.strip():
        # templates that know reasoning find it by these tags
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
    return content


def _call(call: object, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFault("bad_tool_call", f"{what} has a call without a name: {shown(call)}")
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "bad_tool_call", f"arguments of a call in {what}")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call, Mapping) and isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def read_calls(value: object, what: str) -> list[dict[str, Any]]:
    """Tool calls, with arguments as data.

    Raises:
        RowFault: They are no calls.
    """
    if isinstance(value, str):
        value = parse_json(value, "bad_tool_call", what)
    calls = value if isinstance(value, list) else [value]
    return [_call(call, what) for call in calls]


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """The functions of a row, each as `{"type": "function", "function": {…}}`.

    Raises:
        RowFault: They are no list of functions.
    """
    if isinstance(value, str):
        value = parse_json(value, "bad_tools", "'tools'") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowFault("bad_tools", f"'tools' is no list: {shown(value)}")
    tools = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowFault("bad_tools", f"'tools' has a function without a name: {shown(tool)}")
        tools.append({"type": "function", "function": dict(function)})
    return tools


def _is_trained(message: Row, what: str) -> bool:
    for flag in FLAGS:
        value = message.get(flag)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowFault(
                "bad_weight", f"{flag} of {what} is {shown(value)}; 0 or 1 can be trained"
            )
        return bool(value)
    return True


def read_message(message: object, number: int) -> Message:
    """One message of any of the formats.

    Args:
        message: From the row.
        number: Its place in the chat, from 1.

    Raises:
        RowFault: It is none.
    """
    what = f"message {number}"
    named = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or named is None:
        raise RowFault("bad_message", f"{what} has no 'role': {shown(message)}")
    role = _ROLE_OF.get(named) if isinstance(named, str) else None
    if role is None:
        raise RowFault(
            "unknown_role", f"{what} has the role {shown(named)}; known are {', '.join(_ROLE_OF)}"
        )
    if named == "function_call":
        calls = read_calls(message.get("content", message.get("value")), what)
        return {"role": role, "content": "", "tool_calls": calls}
    made: Message = {"role": role, "content": _content(message, f"content of {what}")}
    if message.get("tool_calls"):
        made["tool_calls"] = read_calls(message["tool_calls"], what)
    made.update({name: message[name] for name in _EXTRAS if isinstance(message.get(name), str)})
    if role == "assistant" and not _is_trained(message, what):
        made["train"] = False
    return made


def _joined(messages: list[Message]) -> list[Message]:
    """ShareGPT writes words and call of one turn as two messages; they become one."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        calls = message.get("tool_calls")
        words = last is not None and last["role"] == "assistant" and "tool_calls" not in last
        if last is not None and words and calls and not message["content"]:
            joined[-1] = {**last, "tool_calls": calls}
        else:
            joined.append(message)
    return joined


def read_messages(value: object, column: str) -> list[Message]:
    """A chat as a list of messages, or as the JSON text of one.

    Raises:
        RowFault: It is none.
    """
    if isinstance(value, str):
        value = parse_json(value, "no_messages", f"{column!r}")
    if not isinstance(value, list) or not value:
        raise RowFault("no_messages", f"the row has no {column!r} list, or an empty one")
    return _joined([read_message(message, number) for number, message in enumerate(value, 1)])
