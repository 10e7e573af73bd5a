"""Check that a rendered chat shows all that its row says."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strixft.formats.faults import RowFault, shown
from strixft.formats.messages import Chat, Message

_MARK = 0xF0000
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


def check_calls(render: Callable[..., str], form: Chat, text: str) -> None:
    """Refuse a form in which the template leaves out a name or a value of a call.

    The chat is rendered with a mark at each of them; each mark must be in what comes out, however
    often the same words occur elsewhere. Arguments must not come out as Python writes them.

    Args:
        render: Renders messages and functions with the template.
        form: The chat in the form that was rendered.
        text: What came out.

    Raises:
        RowFault: It names the call.
    """
    made: list[tuple[str, str, str]] = []  # words for each value, the value, and its mark

    def mark(plain: str, what: str) -> str:
        made.append((what, plain, chr(_MARK + len(made) % 0xFFFD)))
        return plain + made[-1][2]

    def marked(value: Any, what: str, of: str) -> Any:
        if isinstance(value, dict):
            return {
                mark(key, f"the argument {shown(key)}{of}"): marked(
                    inner, f"the value of {shown(key)}", of
                )
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [marked(inner, what, of) for inner in value]
        if isinstance(value, str):
            return mark(value, what + of)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _NUMBER + len(made)
            made.append((what + of, json.dumps(value), str(number)))
            return number if isinstance(value, int) else float(number)
        return value  # true, false and null: their key is marked

    def marked_call(call: Mapping[str, Any]) -> dict[str, Any]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        is_text, of = isinstance(arguments, str), f"the call of {shown(name)}"
        written = repr(arguments)
        if not is_text and written in text and json.dumps(arguments) != written:
            told = f"the arguments of {shown(name)} come out as Python's, not as JSON"
            raise RowFault("not_shown", told)
        name = mark(name, of)
        inside = json.loads(arguments) if is_text else arguments
        inside = marked(inside, "a value", f" of {of}")
        arguments = json.dumps(inside, ensure_ascii=False) if is_text else inside
        return {**call, "function": {**call["function"], "name": name, "arguments": arguments}}

    messages = [
        {**one, "tool_calls": list(map(marked_call, one["tool_calls"]))}
        if one.get("tool_calls")
        else one
        for one in form.messages
    ]
    if not made:
        return
    try:
        found = render(messages, form.tools)
    except RowFault:  # of a template that looks names up
        found = None
    for what, plain, sign in made:
        if not (says(text, plain) if found is None else says(found, sign)):
            raise RowFault("not_shown", f"the chat template leaves out {what}")
