"""Rows of every format, with all the keys that data of the world have, for hypothesis.

Each text in a row stands in brackets with a number of its own, so that a test can look for it in
what became of the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from strixft.data.load import Input, read_row
from strixft.data.row_report import Problem
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat


def read_rows(one: Input) -> Iterator[tuple[int, Chat] | Problem]:
    """The rows of an input as chats with their numbers, or the problem of each."""
    for number, raw, _ in one.raw_rows():
        try:
            yield number, read_row(one, raw)
        except RowFault as fault:
            yield Problem(one.name, number, fault.kind, fault.problem, key=fault.key)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["null", "NaN", "007", "1,5", '"', "'", "\n", "\r\n", "{}", "[]", "é", "😀", "مرحبا", "\u2028"]
)
METADATA = ("id", "timestamp", "created_at", "lang", "message_id")
REASONING = ("reasoning_content", "reasoning", "thinking")
UNKNOWN = ("tool_plan", "recipient", "header", "refusal", "reasoning_details", "prefix", "images")
"""Keys of messages that hold something, and that no format reads."""


@dataclass
class Leaves:
    """Makes the texts of one row, and remembers them."""

    draw: st.DrawFn
    texts: list[str] = field(default_factory=list)

    def __call__(self) -> str:
        """A text that stands nowhere else in the row."""
        text = f"⟦{len(self.texts)}:{self.draw(WORDS)}⟧"
        self.texts.append(text)
        return text


@dataclass(frozen=True)
class Style:
    """What the rows of one file have in common, since columns have one type."""

    form: str
    parts: bool
    """Content stands in parts."""
    json_text: bool
    """Arguments of calls and tools are JSON text."""
    flat: bool
    """Calls and tools without the outer `function`."""
    legacy: bool
    """`function_call` and `functions`."""
    reasoning: str


styles = st.builds(
    Style,
    form=st.sampled_from(
        [
            *("messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"),
            *("preference", "thumbs"),
        ]
    ),
    parts=st.booleans(),
    json_text=st.booleans(),
    flat=st.booleans(),
    legacy=st.booleans(),
    reasoning=st.sampled_from(REASONING),
)


def _content(leaf: Leaves, style: Style) -> Any:
    if not style.parts:
        return leaf()
    return [{"type": "text", "text": leaf()} for _ in range(leaf.draw(st.integers(1, 2)))]


def _arguments(leaf: Leaves) -> dict[str, Any]:
    """Arguments of which each has its own type: a column of Arrow has one."""
    kinds: dict[str, Callable[[], Any]] = {
        "s": leaf,
        "n": lambda: leaf.draw(st.integers(-5, 2**40)),
        "f": lambda: leaf.draw(st.floats(allow_nan=False, allow_infinity=False)),
        "b": lambda: leaf.draw(st.booleans()),
        "l": lambda: [leaf(), leaf()],
        "d": lambda: {"deep": leaf()},
    }
    names = leaf.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, unique=True))
    return {name: kinds[name]() for name in names}


def _call(leaf: Leaves, style: Style) -> dict[str, Any]:
    arguments: Any = _arguments(leaf)
    if style.json_text:
        arguments = json.dumps(arguments)
    function = {"name": leaf(), "arguments": arguments}
    if style.flat or style.legacy:
        return function
    return {"type": "function", "function": function, "id": leaf()}


def _tools(leaf: Leaves, style: Style) -> Any:
    tools = []
    for _ in range(leaf.draw(st.integers(1, 2))):
        names = leaf.draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
        sides = {name: {"type": "string", "description": leaf()} for name in names}
        parameters = {"type": "object", "properties": sides, "required": names}
        function = {"name": leaf(), "description": leaf(), "parameters": parameters}
        flat = style.flat or style.legacy
        tools.append(function if flat else {"type": "function", "function": function})
    return json.dumps(tools) if style.json_text else tools


def _answer(leaf: Leaves, style: Style, *, calls: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": _content(leaf, style)}
    if leaf.draw(st.booleans()):
        message[style.reasoning] = leaf()
    if leaf.draw(st.booleans()):
        message["weight"] = leaf.draw(st.sampled_from([0, 1]))
    if calls and style.legacy:
        message["function_call"] = _call(leaf, style)
    elif calls:
        message["tool_calls"] = [_call(leaf, style)]
    return message


def _chat(leaf: Leaves, style: Style) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if leaf.draw(st.booleans()):
        messages.append({"role": "system", "content": _content(leaf, style)})
    for _ in range(leaf.draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": _content(leaf, style)})
        if leaf.draw(st.booleans()):
            result = {"content": _content(leaf, style), "name": leaf()}
            role = "function" if style.legacy else "tool"
            messages += [_answer(leaf, style, calls=True), {"role": role, **result}]
        messages.append(_answer(leaf, style, calls=False))
    messages[-1]["weight"] = 1  # something is to be trained
    if leaf.draw(st.booleans()):
        messages[0][leaf.draw(st.sampled_from(METADATA))] = "metadata"
    return messages


def _sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    return [
        {"from": names.get(m["role"], m["role"]), "value": m["content"]}
        | {key: value for key, value in m.items() if key not in ("role", "content")}
        for m in messages
    ]


def _row(leaf: Leaves, style: Style) -> dict[str, Any]:
    form = style.form
    if form in ("messages", "sharegpt", "thumbs"):
        messages = _chat(leaf, style)
        if form == "sharegpt":
            return {"conversations": _sharegpt(messages)}
        label = {"label": leaf.draw(st.booleans())} if form == "thumbs" else {}
        return {"messages": messages, **label}
    if form == "preference":
        ends = {side: [_answer(leaf, style, calls=False)] for side in ("chosen", "rejected")}
        for (answer,) in ends.values():
            answer["weight"] = 1
        return {"prompt": [{"role": "user", "content": _content(leaf, style)}], **ends}
    columns = {
        "alpaca": ("instruction", "input", "output"),
        "prompt-completion": ("prompt", "completion"),
        "question-answer": ("question", "answer"),
        "text": ("text",),
    }
    row: dict[str, Any] = {column: leaf() for column in columns[form]}
    if form != "text" and leaf.draw(st.booleans()):
        row[style.reasoning] = leaf()
    return row


def _beside(leaf: Leaves, style: Style, row: dict[str, Any]) -> None:
    first: dict[str, Any] = next(
        (value[0] for value in row.values() if isinstance(value, list)), {}
    )
    if "system" not in first.values() and leaf.draw(st.booleans()):
        row["system"] = leaf()
    if leaf.draw(st.booleans()):
        row["functions" if style.legacy else "tools"] = _tools(leaf, style)
    if style.form in ("alpaca", "prompt-completion", "question-answer") and leaf.draw(
        st.booleans()
    ):
        row["history"] = [[leaf(), leaf()]]


@st.composite
def rows(draw: st.DrawFn, style: Style) -> tuple[dict[str, Any], list[str]]:
    """A row that can be read, and every text of it that a template could show."""
    leaf = Leaves(draw)
    row = _row(leaf, style)
    if style.form != "text":
        _beside(leaf, style, row)
    if draw(st.booleans()):
        row[draw(st.sampled_from(["id", "source", "url", "score"]))] = "a column"
    return row, leaf.texts


@st.composite
def files(draw: st.DrawFn) -> list[tuple[dict[str, Any], list[str]]]:
    """Rows of one file."""
    return draw(st.lists(rows(draw(styles)), min_size=1, max_size=4))


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _mappings(inner)


@st.composite
def odd_rows(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, str]]:
    """A row to which somebody added keys, anywhere in it, that say something.

    Returns:
        The row, and its texts, each with the key that was added for it; empty for the others.
    """
    row, known = draw(styles.flatmap(rows))
    leaf = Leaves(draw, known)
    texts = dict.fromkeys(known, "")
    places = st.sampled_from(list(_mappings(row)))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(places)
        names = st.sampled_from([*UNKNOWN, *REASONING, *METADATA, *place, "content", "value"])
        name = draw((names | WORDS).filter(str.isprintable))
        if name in place and not isinstance(place[name], str):
            continue  # its texts would be gone
        texts.pop(str(place.get(name)), None)
        text = leaf()
        texts[text] = name
        shapes = [text, [text], {"a": text}, [{"type": "text", "text": text}]]
        place[name] = draw(st.sampled_from(shapes))
    return row, texts
