"""`thinking` and the template's variables under real chat templates.

What transformers renders with the same variables is the reference, as in `test_templates.py`.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_templates import ONE_CALL, PATHS, TOOLS, chat, tokenizer_for, turn

from strixft.data.encode import Encoder, TokenRow
from strixft.data.template import without_reasoning
from strixft.formats.faults import RowFault
from strixft.formats.known_formats import FORMATS
from strixft.formats.messages import Chat

THINKS = {
    name: path
    for name, path in PATHS.items()
    if re.search(r"think|reasoning", path.read_text())
    and not re.search(r"_v[234]$|^gemma4$|^own-|_vl$", name)  # of one family, one revision
}
SWITCHED = [name for name, path in THINKS.items() if "enable_thinking" in path.read_text()]
THOUGHT, ANSWER = "I see it.", "So be it."
ROWS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "an answer": ([turn("user", "Why?"), turn("assistant", ANSWER, thinking=THOUGHT)], None),
    "two answers": (
        [
            turn("user", "Why?"),
            turn("assistant", ANSWER, thinking=THOUGHT),
            turn("user", "And how?"),
            turn("assistant", "Thus.", reasoning="I know it."),
        ],
        None,
    ),
    "a call": (
        [ONE_CALL[0], {**ONE_CALL[1], "reasoning_content": THOUGHT}, *ONE_CALL[2:]],
        TOOLS,
    ),
}


def read(messages: list[dict[str, Any]], tools: Any = None, **more: Any) -> Chat:
    row = {"messages": messages, **({"tools": tools} if tools else {}), **more}
    return FORMATS["messages"].to_chat(row)


def rows_of(encoder: Encoder, chat: Chat) -> list[TokenRow]:
    (found,) = encoder.encode([chat])
    assert not isinstance(found, RowFault), found.problem
    return [row for row in found if isinstance(row, TokenRow)]


def trained(tokenizer: Any, row: TokenRow) -> str:
    return str(tokenizer.decode(row.input_ids[row.trained].tolist()))


@pytest.mark.parametrize("name", THINKS)
def test_reasoning_that_is_kept_is_shown_and_not_trained(name: str) -> None:
    tokenizer = tokenizer_for(THINKS[name].read_text())
    whole, kept = (Encoder(tokenizer, keep_thinking=keep) for keep in (False, True))
    compared = 0
    for messages, tools in ROWS.values():
        row = read(messages, tools)
        if any(isinstance(found, RowFault) for one in (whole, kept) for found in one.encode([row])):
            continue
        compared += 1
        for one, other in zip(rows_of(whole, row), rows_of(kept, row), strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.prompt_tokens == other.prompt_tokens, "generation begins before reasoning"
            assert (one.trained | other.trained == one.trained).all()
            assert one.trained[-1] == other.trained[-1]
            left = trained(tokenizer, other)
            assert not re.search(r"I see it|I know it|think>|analysis|thought|self", left), left
            for words in (ANSWER, "Thus.", "17 degrees and sunny.", "Rome"):
                assert (words in left) == (words in trained(tokenizer, one)), left
    assert compared >= 2


def test_the_empty_reasoning_of_a_template_is_not_trained_where_reasoning_is_kept() -> None:
    """NVIDIA-NeMo/Automodel#3738: `<think></think>` of the template was in the loss."""
    shown = []
    for name in SWITCHED:
        tokenizer = tokenizer_for(PATHS[name].read_text())
        for one in rows_of(Encoder(tokenizer, keep_thinking=True), read(chat("Hi", "Hello."))):
            assert "think>" not in trained(tokenizer, one), name
            shown.append("think>" in tokenizer.decode(one.input_ids.tolist()))
    assert sum(shown) >= 8


@pytest.mark.parametrize("shape", ROWS)
def test_a_row_whose_reasoning_is_dropped_is_the_row_without_it(shape: str) -> None:
    messages, tools = ROWS[shape]
    names = {"thinking", "reasoning", "reasoning_content"}
    bare = read([{k: v for k, v in one.items() if k not in names} for one in messages], tools)
    assert without_reasoning(read(messages, tools)) == bare
    pair = {"prompt": "Why?", "chosen": f"<think>{THOUGHT}</think>{ANSWER}", "rejected": "No."}
    dropped = without_reasoning(FORMATS["preference"].to_chat(pair))
    assert dropped == FORMATS["preference"].to_chat({**pair, "chosen": ANSWER})


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_is_switched_off_as_transformers_does_it(name: str) -> None:
    """The empty reasoning is part of the prompt then (`/nothink` of GLM-4.5 too)."""
    tokenizer = tokenizer_for(PATHS[name].read_text())
    messages, off = chat("Hi there", "Hello to you."), {"enable_thinking": False}
    render = tokenizer.apply_chat_template
    prompt = render(messages[:1], tokenize=False, add_generation_prompt=True, **off)
    whole = render(messages, tokenize=False, **off)
    ways = [
        (Encoder(tokenizer), read(messages, chat_template_kwargs=off)),
        (Encoder(tokenizer), read(messages, **off)),
        (Encoder(tokenizer, template_kwargs=off), read(messages)),
        (Encoder(tokenizer, template_kwargs={"enable_thinking": True}), read(messages, **off)),
    ]
    for encoder, row in ways:
        (one,) = rows_of(encoder, row)
        text = tokenizer.decode(one.input_ids.tolist())
        assert text.removesuffix(tokenizer.eos_token).rstrip() == whole.rstrip()
        if whole.startswith(prompt):
            begins = len(tokenizer.decode(one.input_ids[: one.prompt_tokens].tolist()))
            assert len(prompt.rstrip()) <= begins <= len(prompt)
            assert "think>" not in trained(tokenizer, one)


def test_a_variable_that_no_template_reads_is_refused_with_its_key() -> None:
    tokenizer = tokenizer_for(PATHS["qwen3"].read_text())
    row = read(chat("Hi", "Hello."), chat_template_kwargs={"custom_instructions": "Be brief."})
    (fault,) = Encoder(tokenizer).encode([row])
    assert isinstance(fault, RowFault)
    assert (fault.kind, fault.key) == ("not_shown", "chat_template_kwargs")
    assert "'custom_instructions'" in fault.problem
    row = read(chat("Hi", "Hello."), enable_thinking=True)
    (fault,) = Encoder(tokenizer_for(PATHS["llama3"].read_text())).encode([row])
    assert isinstance(fault, RowFault)
    assert fault.key == "enable_thinking"


NAMES = ("reasoning_content", "reasoning", "thinking")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe"])
def test_reasoning_is_written_whatever_the_data_call_it(name: str) -> None:
    """huggingface/transformers#44301 (`thinking` was lost), THUDM/slime#330, huggingface/trl#6361.

    The last: an answer of the model itself holds the closing tag alone, since the prompt opened it.
    """
    tokenizer = tokenizer_for(PATHS[name].read_text())
    asked = turn("user", "What is 2+2?")
    answer = turn("assistant", "The answer is 4.", reasoning_content="2+2 equals 4.")
    whole = tokenizer.apply_chat_template([asked, answer], tokenize=False)
    given = [
        turn("assistant", "2+2 equals 4.\n</think>\n\nThe answer is 4."),
        turn("assistant", "<think>\n2+2 equals 4.\n</think>\n\nThe answer is 4."),
        *(turn("assistant", "The answer is 4.", **{key: "2+2 equals 4."}) for key in NAMES),
    ]
    for one in given:
        (row,) = rows_of(Encoder(tokenizer), read([asked, one]))
        text = tokenizer.decode(row.input_ids.tolist())
        assert text.removesuffix(tokenizer.eos_token).rstrip() == whole.rstrip()
        assert "2+2 equals 4." in trained(tokenizer, row)


def test_what_gpt_oss_wrote_is_trained_as_it_wrote_it() -> None:
    tokenizer = tokenizer_for(PATHS["gptoss"].read_text())
    said = (
        "<|channel|>analysis<|message|>I see it.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>So be it.<|return|>"
    )
    (row,) = rows_of(Encoder(tokenizer), read([turn("user", "Why?"), turn("assistant", said)]))
    assert trained(tokenizer, row) == said
