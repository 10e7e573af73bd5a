"""Read messages: roles, tool calls and flags of all the usual chat formats become one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strixft.formats.faults import Keys, RowFault, as_text, check_json, is_empty, parse_json, shown

Message = dict[str, Any]
"""`role`, `content` (text) and, where the row has them, `tool_calls`, `tool_call_id`, `name`;
`train: False` on an answer that is shown and not trained, `train: True` on another message that
asks to be trained."""

DataRow = Mapping[str, Any]
"""A row of a data set, of whatever format."""


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of the OpenAI chat format, which chat templates are written for."""


_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""ShareGPT's names beside them, and OpenAI's earlier one."""

FLAGS = ("train", "weight", "loss_weight", "loss", "loss_scale")
"""Names of the flag that an answer is trained: axolotl, OpenAI, ms-swift, others."""

TOOLS = ("tools", "functions", "tool_defs", "available_tools")
"""Keys of data for functions: OpenAI's, its earlier one, that of verifiers, and others."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of data and chat templates for the reasoning before an answer."""

END_OF_REASONING = "</think>"

_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(?P<reasoning>.*?)<\|end\|>"
    r"\s*<\|start\|>assistant<\|channel\|>final<\|message\|>(?P<answer>.*?)"
    r"(?:<\|(?:return|end)\|>)?\s*",
    re.DOTALL,
)
"""An answer as gpt-oss writes it: reasoning in one channel, what it says in another."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of chat templates that are set for each row and cannot be chosen."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One row, whatever its format."""

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
    template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template for this row, such as `enable_thinking`."""
    unused: frozenset[str] = field(default=frozenset(), compare=False)
    """Columns, and keys of messages, that describe the row and are not read."""


def _parts(parts: list[Any], what: str, above: Keys) -> tuple[str, str | None]:
    """Return the text of content parts, and the reasoning before it."""
    texts: list[str] = []
    reasoning: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RowFault("not_text", f"{what} has a part that is not text: {shown(part)}")
        keys = above.inside(part, f"a part of {what}")
        kind = keys.take("type")
        if kind in ("thinking", "reasoning"):
            if any(map(str.strip, texts)):
                raise RowFault("not_text", f"{what} has reasoning after its text")
            thought = keys.take(*REASONING, "text")
            nested = isinstance(thought, list)  # as Mistral's tokenizers write it
            thought = _parts(thought, keys.what, keys)[0] if nested else thought
            reasoning.append(as_text(thought, keys.what))
        elif kind in ("text", "input_text", "output_text") or (kind is None and "text" in part):
            texts.append(as_text(keys.take("text"), keys.what))
        else:
            name = shown(kind if kind is not None else part)
            raise RowFault("not_text", f"{what} has a part of type {name}; only text is trained")
        keys.finish("part")
    return "".join(texts), "\n".join(reasoning) if reasoning else None


def with_reasoning(content: str, reasoning: str, what: str) -> str:
    """Return an answer after its reasoning, in the tags by which templates find it.

    Raises:
        RowFault: The answer holds other reasoning already, or no answer follows.
    """
    own, end, _ = content.partition(END_OF_REASONING)
    if end:
        if own.strip().removeprefix("<think>").strip() == reasoning.strip():
            return content
        raise RowFault("two_values", f"{what} has reasoning in its text and other in a key")
    return f"<think>\n{reasoning.strip()}\n{END_OF_REASONING}\n\n{content.lstrip()}"


def channels_apart(content: str, what: str) -> str:
    """Return an answer that is written in gpt-oss' channels as one after its reasoning.

    Its own chat template refuses channels in a text, since it writes them itself.
    """
    found = _CHANNELS.fullmatch(content) if "<|channel|>" in content else None
    return with_reasoning(found["answer"], found["reasoning"], what) if found else content


def _in_order(made: dict[str, Any], written: DataRow) -> dict[str, Any]:
    """Return what was read in the order in which it was written: templates show it as JSON."""
    added = {key: value for key, value in made.items() if key not in written}
    return {**added, **{key: made[key] for key in written if key in made}}


def _call(call: object, what: str, above: Keys) -> dict[str, Any]:
    nameless = RowFault("bad_tool_call", f"{what} has a call without a name: {shown(call)}")
    if not isinstance(call, Mapping):
        raise nameless
    keys = above.inside(call, f"a call of {what}")
    kind, number, function = keys.take("type"), keys.take("id"), keys.take("function")
    inner = above.inside(function, keys.what) if isinstance(function, Mapping) else keys
    name = inner.take("name")
    if not isinstance(name, str):
        raise nameless
    if kind not in ("function", "function_call", None):
        raise RowFault("bad_tool_call", f"{keys.what} has the type {shown(kind)}, not 'function'")
    arguments = inner.take("arguments", "parameters")
    if isinstance(arguments, str) and arguments.strip():
        about = f"the arguments of a call in {what}"
        arguments = parse_json(arguments, "bad_tool_call", about)
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowFault("bad_tool_call", f"{keys.what} has arguments without names: {shown(call)}")
    check_json(arguments, "bad_tool_call", f"{keys.what}: {name}")
    told = {"name": as_text(name, keys.what), "arguments": dict(arguments)}
    made: dict[str, Any] = {"type": "function", "function": _in_order(told, function or call)}
    if number is not None:
        made["id"] = as_text(number, f"the id of a call in {what}")
    for one in (inner, keys):
        one.finish("call")
    return _in_order(made, call)


def _tool(tool: object) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, "bad_tools", "one of 'tools'")
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowFault("bad_tools", f"'tools' has a function without a name: {shown(tool)}")
    assert isinstance(tool, Mapping)
    if tool.get("type") not in ("function", None):
        raise RowFault("bad_tools", f"'tools' has the type {shown(tool['type'])}, not 'function'")
    function = {k: v for k, v in function.items() if k != "type" or function is not tool}
    if isinstance(function.get("parameters"), str):
        about = f"the parameters of {function['name']!r}"
        function["parameters"] = parse_json(function["parameters"], "bad_tools", about)
    made = {**(tool if "function" in tool else {}), "type": "function", "function": function}
    check_json(made, "bad_tools", f"'tools': {function['name']}")
    return _in_order(made, tool)


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Return the functions of a row, each as `{"type": "function", "function": {…}}`.

    Raises:
        RowFault: They are not a list of functions.
    """
    if isinstance(value, str):
        value = parse_json(value, "bad_tools", "'tools'") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowFault("bad_tools", f"'tools' is not a list: {shown(value)}")
    return [_tool(tool) for tool in value]


def read_template_kwargs(keys: Keys) -> dict[str, Any] | None:
    """Return a row's variables of the chat template; those without a value are left out.

    TRL and transformers name them `chat_template_kwargs`. `enable_thinking`, the most common of
    them, may stand in a column of its own.

    Raises:
        RowFault: They are not a mapping of names to JSON values.
    """
    name = "chat_template_kwargs"
    value = keys.take(name)
    if isinstance(value, str):
        value = parse_json(value, "bad_template_kwargs", f"{name!r}") if value.strip() else None
    if value is not None and not isinstance(value, Mapping):
        raise RowFault("bad_template_kwargs", f"{name!r} is not a mapping: {shown(value)}", name)
    made = {k: v for k, v in (value or {}).items() if v is False or not is_empty(v)}
    thinking = keys.take("enable_thinking")
    if thinking is not None and not isinstance(thinking, bool):
        told = f"'enable_thinking' should be true or false, it is {shown(thinking)}"
        raise RowFault("bad_template_kwargs", told, "enable_thinking")
    if thinking is not None and made.setdefault("enable_thinking", thinking) is not thinking:
        told = f"has 'enable_thinking' and other in {name!r}"
        raise RowFault("two_values", told, "enable_thinking")
    check_json(made, "bad_template_kwargs", name)
    return made or None


def _flag(keys: Keys) -> bool | None:
    """Return True if a message asks to be trained, None if it says nothing."""
    found = {flag: value for flag in FLAGS if (value := keys.take(flag)) is not None}
    for flag, value in found.items():
        if value not in (0, 1):
            raise RowFault(
                "bad_weight", f"{flag} of {keys.what} is {shown(value)}; 0 or 1 can be trained"
            )
    if len(set(map(bool, found.values()))) > 1:
        raise RowFault("two_values", f"{keys.what} has {' and '.join(found)}, which differ")
    return next(map(bool, found.values()), None)


def _content(value: object, keys: Keys, role: str, *, calls: bool) -> str:
    """Return the text of a message, an answer's reasoning before it."""
    about, within = f"content of {keys.what}", None
    if isinstance(value, list):
        value, within = _parts(value, about, keys)
    reasoning = keys.take(*REASONING)
    if within is not None and not is_empty(reasoning) and reasoning != within:
        raise RowFault("two_values", f"{keys.what} has reasoning in its parts and other in a key")
    reasoning = within if is_empty(reasoning) else reasoning
    if value is None and not calls:
        keys.finish("message")  # a key in its place is a better reason than its absence
    content = as_text("" if value is None and calls else value, about)
    content = channels_apart(content, about) if role == "assistant" else content
    if is_empty(reasoning):
        return content
    if role != "assistant":
        raise RowFault("not_text", f"{keys.what}, the {role}'s, has reasoning: {shown(reasoning)}")
    if not content.strip() and not calls:
        raise RowFault("empty_turn", f"{keys.what} has reasoning, and no answer after it")
    return with_reasoning(content, as_text(reasoning, f"reasoning of {keys.what}"), about)


def _calls_of(content: object, keys: Keys, role: str) -> list[dict[str, Any]]:
    """Return the calls of a message, with arguments as data.

    Args:
        content: Of a message that is a call and nothing else; None of others.
        keys: Of the message.
        role: Of the message.
    """
    found = {name: keys.take(name) for name in ("tool_calls", "function_call")}
    said = {name: value for name, value in found.items() if not is_empty(value)}
    said |= {} if content is None else {"content": content}
    if len(said) > 1:
        raise RowFault("two_values", f"{keys.what} has calls in {' and '.join(map(repr, said))}")
    if not said:
        return []
    calls = next(iter(said.values()))
    if role != "assistant":
        raise RowFault("bad_tool_call", f"{keys.what}, the {role}'s, has calls: {shown(calls)}")
    if isinstance(calls, str):
        calls = parse_json(calls, "bad_tool_call", keys.what)
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call, keys.what, keys) for call in calls]


def read_message(message: object, number: int, above: Keys) -> Message:
    """Return one message of any of the formats in our form.

    Args:
        message: From the row.
        number: Its place in the chat, from 1.
        above: The row.

    Raises:
        RowFault: It is not a message, or has a key that is not read.
    """
    what = f"message {number}"
    if not isinstance(message, Mapping):
        raise RowFault("bad_message", f"{what} has no 'role': {shown(message)}")
    keys = above.inside(message, what)
    named = keys.take("role", "from")
    if named is None:
        raise RowFault("bad_message", f"{what} has no 'role': {shown(message)}")
    role = _ROLE_OF.get(named) if isinstance(named, str) else None
    if role is None:
        raise RowFault(
            "unknown_role", f"{what} has the role {shown(named)}; known are {', '.join(_ROLE_OF)}"
        )
    value = keys.take("content", "value")
    plain = isinstance(value, str) and "<|channel|>" not in value
    if plain and keys.all_read and named != "function_call":
        return {"role": role, "content": as_text(value, f"content of {what}")}
    made: Message = {"role": role, "content": ""}
    for key in ("name", "tool_call_id") if role == "tool" else ("name",):
        if not is_empty(said := keys.take(key)):
            made[key] = as_text(said, f"{key} of {what}")
    flag = _flag(keys)
    if flag is not None and flag is not (role == "assistant"):
        made["train"] = flag
    tools = read_tools(keys.take(*TOOLS))
    if tools:
        made["tools"] = tools
    is_call = named == "function_call"
    calls = _calls_of((value or "") if is_call else None, keys, role)
    if calls:
        made["tool_calls"] = calls
    if not is_call:
        made["content"] = _content(value, keys, role, calls=bool(calls))
    keys.finish("message")
    return made


def _joined(messages: list[Message]) -> list[Message]:
    """Join words and call of one turn, which ShareGPT writes as two messages."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        calls = message.get("tool_calls")
        words = last is not None and last["role"] == "assistant" and "tool_calls" not in last
        alike = last is not None and last.get("train") == message.get("train")
        if last is not None and words and calls and not message["content"] and alike:
            joined[-1] = {**last, "tool_calls": calls}
        else:
            joined.append(message)
    return joined


def read_messages(value: object, column: str, above: Keys) -> list[Message]:
    """Return the messages of a chat: of a list, or of the JSON text of one.

    Raises:
        RowFault: It is not a chat.
    """
    if isinstance(value, str):
        value = parse_json(value, "no_messages", f"{column!r}")
    if not isinstance(value, list) or not value:
        raise RowFault("no_messages", f"the row has no {column!r} list, or an empty one")
    return _joined(
        [read_message(message, number, above) for number, message in enumerate(value, 1)]
    )
