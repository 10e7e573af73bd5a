"""Real chat templates of many families against `apply_chat_template`: equal, or refused by name.

Templates are those of TRL's wheel (`trl/chat_templates`, as the models' repositories ship them) and
those of `tests/templates`. Rows of every shape are read as a user's rows are, rendered, masked and
turned into tokens; the texts must be what transformers makes of the same rows, and what is trained
must be what two other ways find: the difference between a prompt and the chat that answers it, and
the `{% generation %}` marks of TRL's training variants.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from strixft.data.checks import check_chat
from strixft.data.encode import Encoder, TokenRow
from strixft.data.row_report import runs
from strixft.data.template import tools_as_text
from strixft.formats.faults import RowFault
from strixft.formats.known_formats import FORMATS
from strixft.formats.messages import Message

TRL = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
OURS = Path(__file__).parent.parent / "templates"
PATHS = {
    **{path.stem: path for path in sorted(TRL.glob("*.jinja")) if "training" not in path.stem},
    **{f"own-{path.stem}": path for path in sorted(OURS.glob("*.jinja"))},
}
BOS, EOS = "<s>", "<|endoftext|>"
_SPECIAL = re.compile(r"<[|｜]?[\w▁/:.-]+[|｜]?>|<\|[^<>'\"{}\s]+\|?>|\[/?[A-Z_]{3,}\]|<[a-z_]+\|>")
_END = re.compile(r"(\[/?[A-Z_]+\]|###)$")
_TAGS = re.compile(r"\s*(<[^<>]*>\s*(model\s*)?)*")
_HALF_A_TAG = re.compile(r"<[^<>]*\Z")
_HEADER = re.compile(r"<[^<>]*>|assistant|model|user|to=|\s")
_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
NOT_SPECIAL = re.compile(r"</?(think|tool_call|tool_response|function|parameter|tools|arg_).*")
"""Written by templates as words, which answers hold too."""


@cache
def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer_for(source: str) -> Any:
    """A tokenizer of single bytes that has the special tokens of a template."""
    found = [one for one in dict.fromkeys(_SPECIAL.findall(source)) if not NOT_SPECIAL.match(one)]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, *found])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
    made.chat_template = source
    return made


def turn(role: str, content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*texts: str) -> list[dict[str, Any]]:
    return [turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def call(name: str, number: int | None = 0, /, **arguments: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if number is None else {"id": f"callNum{number:02}", **made}


def result(content: str, name: str, number: int = 0) -> dict[str, Any]:
    return turn("tool", content, tool_call_id=f"callNum{number:02}", name=name)


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


CITY = {"type": "string", "description": "Name of the city."}
TOOLS = [
    tool("weather", "The weather of a city.", city=CITY),
    tool("add", 'Adds "numbers" & more.', numbers={"type": "array", "items": {"type": "number"}}),
]
ASKED = "Weather in Rome, and 1 + 2?"
ONE_CALL = [
    turn("user", "How is Rome?"),
    turn("assistant", "", tool_calls=[call("weather", city="Rome")]),
    result('17 degrees, "sunny"', "weather"),
    turn("assistant", "17 degrees and sunny."),
]
TWO_CALLS = [
    turn("user", ASKED),
    turn(
        "assistant", "", tool_calls=[call("weather", city="Rome"), call("add", 1, numbers=[1, 2])]
    ),
    result("17 degrees", "weather"),
    result("3", "add", 1),
    turn("assistant", "17 degrees; 3."),
]
NESTED: dict[str, Any] = {"deep": {"list": [1, 2.5, "x\ny", None, True]}, "quote": 'a "b" <c> é'}

SHAPES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": (chat("Hi there", "Hello to you."), None),
    "several turns": (chat("One?", "First.", "Two?", "Second.", "Three?", "Third."), None),
    "system": ([turn("system", "Be brief."), *chat("Hi there", "Hello.", "Bye", "So long.")], None),
    "system in the middle": (
        [*chat("Hi there", "Hello."), turn("system", "Be brief."), *chat("Bye", "So long.")],
        None,
    ),
    "developer": ([turn("developer", "Be brief."), *chat("Hi there", "Hello.")], None),
    "the same words twice": (
        [turn("system", "Be brief."), turn("developer", "Be brief."), *chat("Be brief.", "Yes.")],
        None,
    ),
    "unicode": (chat("你好\u3000é\u0301", " 🏳️‍🌈 ﷽ \n\n", "\u202eab", "Z̃  end\t."), None),
    "parts": (
        [
            turn("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]),
            turn("assistant", [{"type": "text", "text": "Hello."}]),
        ],
        None,
    ),
    "thinking": (
        [turn("user", "Why?"), turn("assistant", "So.", reasoning_content="I see it.")],
        None,
    ),
    "thinking in tags": (chat("Why?", "<think>\nI see it.\n</think>\n\nSo."), None),
    "thinking twice": (
        [
            turn("user", "Why?"),
            turn("assistant", "So.", reasoning_content="I see it."),
            turn("user", "And how?"),
            turn("assistant", "Thus.", reasoning_content="I know it."),
        ],
        None,
    ),
    "thought before": (
        [
            turn("user", "Why?"),
            turn("assistant", "So.", reasoning_content="I see it."),
            *chat("And how?", "Thus."),
        ],
        None,
    ),
    "tools that nobody calls": (chat("Hi there", "Hello."), TOOLS),
    "a call": (ONE_CALL, TOOLS),
    "a call and words": (
        [ONE_CALL[0], {**ONE_CALL[1], "content": "Let me look."}, *ONE_CALL[2:]],
        TOOLS,
    ),
    "a call at the end": (ONE_CALL[:2], TOOLS),
    "a call without tools": (ONE_CALL, None),
    "a call without a number": (
        [
            ONE_CALL[0],
            turn("assistant", "", tool_calls=[call("weather", None, city="Rome")]),
            turn("tool", "17 degrees", name="weather"),
            ONE_CALL[3],
        ],
        TOOLS,
    ),
    "arguments of all kinds": (
        [
            ONE_CALL[0],
            turn("assistant", "", tool_calls=[call("weather", 0, **NESTED)]),
            *ONE_CALL[2:],
        ],
        TOOLS,
    ),
    "two calls": (TWO_CALLS, TOOLS),
    "two calls in turn": ([*ONE_CALL, *TWO_CALLS], TOOLS),
    "thinking and a call": (
        [ONE_CALL[0], {**ONE_CALL[1], "reasoning_content": "I must look."}, *ONE_CALL[2:]],
        TOOLS,
    ),
    "system and tools": ([turn("system", "Be brief."), *ONE_CALL], TOOLS),
}


@dataclass(frozen=True)
class Answered:
    """What transformers makes of a chat up to one of its answers, in one form of the messages."""

    number: int
    prompt: str
    whole: str
    message: Message


def with_reasoning(message: Message, *, inside: bool) -> Message:
    """The reasoning of an answer in tags before it, or in the key that transformers documents."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning is None and "</think>" in content:
        reasoning, _, content = content.removeprefix("<think>").partition("</think>")
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    if reasoning is None:
        return rest
    reasoning, content = reasoning.strip(), content.lstrip()
    if inside:
        return {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{content}"}
    return {**rest, "content": content, "reasoning_content": reasoning}


def with_json_calls(message: Message) -> Message:
    calls = [
        {
            **one,
            "function": {
                **one["function"],
                "arguments": json.dumps(one["function"]["arguments"], ensure_ascii=False),
            },
        }
        for one in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def joined(message: Message) -> Message:
    content = message["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    return {**message, "content": "".join(part["text"] for part in parts)}


def in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def forms(messages: list[Message], tools: Any, source: str) -> Iterator[tuple[list[Message], Any]]:
    """The forms in which transformers may be given a row; each says the same."""
    for inside in (False, True):
        plain = [with_reasoning(joined(message), inside=inside) for message in messages]
        yield plain, tools
        yield [with_json_calls(message) for message in plain], tools
        yield [in_parts(message) for message in plain], tools
        if "tools" not in source:  # docs/data.md: functions and calls are written out
            written = tools_as_text(plain, tools)
            yield written, None
            yield [in_parts(message) for message in written], None


def references(tokenizer: Any, messages: list[Message], tools: Any) -> list[Answered]:
    found = []
    render = tokenizer.apply_chat_template
    for form, given in forms(messages, tools, tokenizer.chat_template):
        answers = [index for index, message in enumerate(form) if message["role"] == "assistant"]
        for number, index in enumerate(answers):
            with contextlib.suppress(Exception):  # of a template that takes another form
                prompt = render(
                    form[:index], tools=given, tokenize=False, add_generation_prompt=True
                )
                whole = render(form[: index + 1], tools=given, tokenize=False)
                found.append(Answered(number, prompt, whole, form[index]))
    return found


def common(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def core(text: str, tokenizer: Any) -> str:
    """A text without its spaces and without the special tokens at its end."""
    text = "".join(text.split())
    while (shorter := _END.sub("", text)) != text or any(
        (shorter := text.removesuffix(token)) != text for token in tokenizer.get_added_vocab()
    ):
        text = shorter
    return text


def said(message: Message) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def parting(prompt: str, text: str) -> int:
    """Where a text goes on after a prompt, or parts from it; never within a tag."""
    if text.startswith(prompt):
        return len(prompt.rstrip())
    return len(_HALF_A_TAG.sub("", text[: common(prompt, text)]))


def stands_after(text: str, start: int, prompt: str) -> bool:
    """A stretch begins where the prompt ends, or where an earlier answer's header does.

    An earlier answer may stand after a chat that is shown in other words by now, and an answer
    without reasoning after a prompt that opens some.
    """
    begin = parting(prompt, text)
    gap, before = text[begin:start], text[start:begin]
    if text.startswith(prompt):
        return not gap.strip() and not before.strip()
    return bool(_TAGS.fullmatch(gap)) or header(text[:start]) == header(prompt)


def header(prompt: str) -> str:
    """The last characters before an answer."""
    return _OPENED.sub("", prompt).rstrip()[-10:]


def explained(text: str, start: int, end: int, refs: list[Answered], tokenizer: Any) -> set[int]:
    """The answers, by their numbers, of which a trained stretch is all that the model writes."""
    found = set()
    run = core(text[start:end], tokenizer)
    for one in refs:
        answer = one.whole[parting(one.prompt, one.whole) :]
        bare = answer[_TAGS.match(answer).end() :]  # type: ignore[union-attr]
        words = {said(one.message), said(one.message).removeprefix("<think>")}
        late = one.whole.rpartition(header(one.prompt))[2]
        same = run in {core(text, tokenizer) for text in (answer, bare, late, *words)}
        if same and stands_after(text, start, one.prompt):
            found.add(one.number)
    return found


def is_shown(text: str, refs: list[Answered], tokenizer: Any) -> bool:
    """A row is a chat as transformers shows it, or its prompt and the answer in its own words."""
    text = text.rstrip()
    for one in refs:
        if text.removesuffix(tokenizer.eos_token).rstrip() in (
            one.whole.rstrip(),
            one.whole.rstrip().removesuffix(tokenizer.eos_token).rstrip(),
        ):
            return True
        written = {said(one.message), said(one.message).removeprefix("<think>")}
        if text.startswith(one.prompt) and core(text[len(one.prompt) :], tokenizer) in {
            core(words, tokenizer) for words in written
        }:
            return True
    return False


def stretches(row: TokenRow, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Trained characters of a row."""
    ids = row.input_ids.tolist()
    for first, last, trained in runs(row.trained):
        if trained:
            yield len(tokenizer.decode(ids[:first])), len(tokenizer.decode(ids[:last]))


def tried(tokenizer: Any, encoder: Encoder, shape: str) -> str:
    """Read, render, mask and compare a row; what it is refused for, or `equal`."""
    messages, tools = SHAPES[shape]
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    chat = FORMATS["messages"].to_chat(row)
    check_chat(chat)
    (found,) = encoder.encode([chat])
    if isinstance(found, RowFault):
        return found.kind
    refs = references(tokenizer, messages, tools)
    answers: list[int] = []
    for one in found:
        assert isinstance(one, TokenRow)
        text = tokenizer.decode(one.input_ids.tolist())
        assert is_shown(text, refs, tokenizer), text
        for start, end in stretches(one, tokenizer):
            of = explained(text, start, end, refs, tokenizer)
            assert of, (text, text[start:end])
            answers.append(min(of - set(answers), default=-1))
    wanted = {one.number for one in refs}
    assert sorted(answers) == sorted(wanted), answers
    return "equal"


REFUSED: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "refused.json").read_text(encoding="utf-8")
)
"""Rows that a template refuses or would not show whole, by kind; all others are equal."""


@pytest.mark.parametrize("name", PATHS)
def test_every_row_is_as_transformers_shows_it_or_refused(name: str) -> None:
    tokenizer = tokenizer_for(PATHS[name].read_text())
    encoder = Encoder(tokenizer)
    found: dict[str, list[str]] = {}
    for shape in SHAPES:
        outcome = tried(tokenizer, encoder, shape)
        if outcome != "equal":
            found.setdefault(outcome, []).append(shape)
    assert {kind: ", ".join(shapes) for kind, shapes in found.items()} == REFUSED.get(name, {})


def test_families_are_many() -> None:
    """The revisions of one template count once."""
    assert len({re.sub(r"_v\d$", "", name) for name in PATHS}) >= 40
    assert len(PATHS) * len(SHAPES) >= 1000
    refused = [
        shape
        for kinds in REFUSED.values()
        for names in kinds.values()
        for shape in names.split(", ")
    ]
    assert set(refused) <= set(SHAPES)
    assert len(refused) == 101


ENDS_OTHERWISE = ("glm4moe",)
"""TRL's variant ends an answer with the token of the next turn, which the template does not."""


def marked_by_trl(name: str, tokenizer: Any, shape: str, row: TokenRow) -> list[int] | None:
    """The mask of TRL's training variant where it shows the same text; None where it does not."""
    messages, tools = SHAPES[shape]
    template = (TRL / f"{name}_training.jinja").read_text()
    for form, given in forms(messages, tools, tokenizer.chat_template):
        with contextlib.suppress(Exception):  # of a template that takes another form
            made = tokenizer.apply_chat_template(
                form,
                tools=given,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids = row.input_ids.tolist()
            if made["input_ids"] in (ids, ids[:-1]):  # without the end that the template lacks
                return [*made["assistant_masks"], 1][: len(ids)]
    return None


@pytest.mark.parametrize(
    "name", [name for name in PATHS if (TRL / f"{name}_training.jinja").is_file()]
)
def test_what_is_trained_is_what_trl_marks(name: str) -> None:
    """But for the header of an answer, which some of TRL's variants train and prompts give."""
    tokenizer = tokenizer_for(PATHS[name].read_text())
    encoder, compared = Encoder(tokenizer), 0
    for shape, (messages, tools) in SHAPES.items():
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        (found,) = encoder.encode([FORMATS["messages"].to_chat(row)])
        if isinstance(found, RowFault) or len(found) > 1:
            continue
        (one,) = found
        assert isinstance(one, TokenRow)
        theirs = marked_by_trl(name, tokenizer, shape, one)
        if theirs is None:
            continue
        compared += 1
        differ = [
            token
            for token, mark, trained in zip(
                one.input_ids.tolist(), theirs, one.trained, strict=True
            )
            if bool(mark) != bool(trained)
        ]
        # transformers' mask loses the last bytes of a character that is several tokens
        assert not _HEADER.sub("", tokenizer.decode(differ)).replace("\ufffd", ""), shape
    assert compared >= (5 if name not in ENDS_OTHERWISE else 0)
