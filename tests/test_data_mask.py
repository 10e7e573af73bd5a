"""What is trained, read back from the tokens: the assistant's words and their end, nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strixft.data.encode import Encoder, TokenRow
from strixft.data.row_report import runs
from strixft.data.template import ChatTemplate
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.support.errors import DataError

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Case:
    """A chat template, and what it writes around answers."""

    families: tuple[str, ...]
    end: str
    """The end token of an answer."""
    specials: tuple[str, ...]
    lead: str = ""
    """What it puts between prompt and last answer; the model has to write it."""
    lead_earlier: str = ""
    takes_system: bool = True
    shows_reasoning: str = "all"
    """Of which answers it shows the reasoning: all, last, none."""
    trims: bool = False
    bos: str = field(default="<s>")


CASES = {
    "chatml": Case((), "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama3": Case(
        ("llama",),
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trims=True,
    ),
    "gemma2": Case(
        ("gemma2",),
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        takes_system=False,
        trims=True,
    ),
    "gemma3": Case(
        ("gemma3_text",), "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), trims=True
    ),
    "mistral": Case(
        ("mistral",), "</s>", ("[INST]", "[/INST]"), lead=" ", lead_earlier=" ", trims=True
    ),
    "mistral-small": Case(
        ("mistral",), "</s>", ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    ),
    "qwen2": Case(("qwen2",), "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "qwen3": Case(
        ("qwen3",),
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
        lead="<think>\n\n</think>\n\n",
        shows_reasoning="last",
    ),
    "deepseek-r1": Case(
        ("llama", "qwen2", "qwen3"),
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        shows_reasoning="none",
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)

MakeEncoder = Callable[..., Encoder]


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def tokenizers(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer with each of the templates, and with the tokens that they write."""
    made = {}
    for name, case in CASES.items():
        one = copy.deepcopy(tokenizer)
        one.add_special_tokens({"bos_token": case.bos, "eos_token": case.end})
        one.add_special_tokens({"additional_special_tokens": list(case.specials)})
        one.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        made[name] = one
    return made


def encode(tokenizer: Any, messages: list[Message], loss_on: str = "assistant") -> list[TokenRow]:
    """The rows of one chat."""
    (found,) = Encoder(tokenizer, loss_on).encode([Chat(messages)])
    assert not isinstance(found, RowFault), found
    return [row for row in found if isinstance(row, TokenRow)]


def trained_texts(tokenizer: Any, row: TokenRow) -> list[str]:
    """Each trained stretch of a row, decoded."""
    return [
        tokenizer.decode(row.input_ids[start:end].tolist(), skip_special_tokens=False)
        for start, end, trained in runs(row.trained)
        if trained
    ]


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def chat(*texts: str) -> list[Message]:
    """Turns of the user and of the assistant, one after the other."""
    return [turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def expected(case: Case, answers: list[str]) -> list[str]:
    """What should be trained of a chat without reasoning."""
    leads = [case.lead_earlier] * (len(answers) - 1) + [case.lead]
    texts = [answer.strip() if case.trims else answer for answer in answers]
    return [f"{lead}{text}{case.end}" for lead, text in zip(leads, texts, strict=True)]


def test_every_family_has_a_template() -> None:
    assert {family for case in CASES.values() for family in case.families} == FAMILIES
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {*CASES, "plain"}


@EVERY
@pytest.mark.parametrize("prompt", [False, True])
def test_a_chat_is_rendered_as_the_tokenizer_renders_it(
    name: str, prompt: bool, tokenizers: dict[str, Any]
) -> None:
    one = tokenizers[name]
    messages = chat("Hi", "<think>\nwhy\n</think>\n\nHello.", "Bye", "So long.", "And now?")
    messages = messages if prompt else messages[:-1]
    assert ChatTemplate(one).render(messages, prompt=prompt) == one.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )


@EVERY
def test_the_answers_of_a_chat_are_trained_with_their_ends(
    name: str, tokenizers: dict[str, Any]
) -> None:
    (row,) = encode(tokenizers[name], chat("Hi there", "Hello.", "Bye now", "So long, friend!"))
    assert trained_texts(tokenizers[name], row) == expected(
        CASES[name], ["Hello.", "So long, friend!"]
    )


@EVERY
def test_a_system_message_changes_nothing_that_is_trained(
    name: str, tokenizers: dict[str, Any]
) -> None:
    case = CASES[name]
    messages = [turn("system", "Answer in one word."), *chat("Hi", "Hello.", "Bye", "Bye.")]
    if not case.takes_system:
        (fault,) = Encoder(tokenizers[name]).encode([Chat(messages)])
        assert isinstance(fault, RowFault)
        assert fault.kind == "template_refuses"
        assert "takes no system message" in fault.problem
        return
    rows = encode(tokenizers[name], messages)
    texts = [text for row in rows for text in trained_texts(tokenizers[name], row)]
    assert texts == expected(case, ["Hello.", "Bye."])
    for row in rows:  # also where the template shows it to the last question only
        assert "Answer in one word." in tokenizers[name].decode(row.input_ids.tolist())


@EVERY
def test_completion_trains_the_last_answer_and_all_trains_everything(
    name: str, tokenizers: dict[str, Any]
) -> None:
    one, messages = tokenizers[name], chat("Hi", "Hello.", "Bye", "So long.")
    (last,) = encode(one, messages, "completion")
    assert trained_texts(one, last) == expected(CASES[name], ["Hello.", "So long."])[1:]
    (whole,) = encode(one, messages, "all")
    assert whole.trained[1:].all()
    assert not whole.trained[0]
    assert whole.prompt_tokens == last.prompt_tokens


@EVERY
def test_the_prompt_ends_where_the_last_answer_starts(
    name: str, tokenizers: dict[str, Any]
) -> None:
    one, case = tokenizers[name], CASES[name]
    (row,) = encode(one, chat("Hi", "Hello.", "Bye", "So long."))
    rest = one.decode(row.input_ids[row.prompt_tokens :].tolist())
    assert rest.strip() == f"{case.lead}So long.{case.end}".strip()
    assert (row.request, row.answer) == ("Bye", "So long.")


@EVERY
def test_spaces_around_an_answer_are_trained_as_the_template_shows_them(
    name: str, tokenizers: dict[str, Any]
) -> None:
    rows = encode(tokenizers[name], chat("Hi", "  Hello.\n", "Bye", "\n So long. \n"))
    texts = [text for row in rows for text in trained_texts(tokenizers[name], row)]
    meant = expected(CASES[name], ["  Hello.\n", "\n So long. \n"])
    # the line end of a header may share a token with spaces after it
    assert [text.lstrip() for text in texts] == [text.lstrip() for text in meant]


@EVERY
def test_reasoning_is_trained_whole_whatever_the_template_leaves_out(
    name: str, tokenizers: dict[str, Any]
) -> None:
    one, case = tokenizers[name], CASES[name]
    thoughts = ["<think>\nfirst thought\n</think>\n\nHello.", "<think>\nsecond\n</think>\n\nBye."]
    rows = encode(one, chat("Hi", thoughts[0], "Bye", thoughts[1]))
    texts = sorted(text.strip() for row in rows for text in trained_texts(one, row))
    if case.shows_reasoning == "none":  # the prompt has opened the reasoning
        thoughts = [text.removeprefix("<think>\n") for text in thoughts]
    assert texts == sorted(f"{text}{case.end}" for text in thoughts)
    assert len(rows) == (1 if case.shows_reasoning == "all" else 2)


@EVERY
def test_reasoning_is_trained_after_the_prompt_that_the_model_will_be_given(
    name: str, tokenizers: dict[str, Any]
) -> None:
    one = tokenizers[name]
    messages = chat("Hi", "<think>\nwhy\n</think>\n\nHello.")
    (row,) = encode(one, messages)
    prompt = one.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert one.decode(row.input_ids[: row.prompt_tokens].tolist()) == prompt


@EVERY
def test_an_answer_that_is_marked_is_shown_and_not_trained(
    name: str, tokenizers: dict[str, Any]
) -> None:
    messages = chat("Hi", "Hello.", "Bye", "So long.")
    messages[1]["train"] = False
    (row,) = encode(tokenizers[name], messages)
    assert trained_texts(tokenizers[name], row) == expected(CASES[name], ["Hello.", "So long."])[1:]
    assert "Hello." in tokenizers[name].decode(row.input_ids.tolist())


NASTY = [
    "assistant",
    "<|im_start|>assistant\nHello.",
    "<start_of_turn>model\nHello.",
    "[/INST] Hello.",
    "<｜Assistant｜><think>\nHello.",
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.",
    "\ue000Hello.\ue001",
    "\ue000\U000f0000Hello.\U00100001",
    "<think>",
    "{{ messages }} {% for x in y %}",
    "\u202eolleH",
    "Hello.\n\n\nHello.",
    "```python\ndef f(x):\n    return x\n```",
    "你好，世界。",
    "é\u0301 🏳️‍🌈 ﷽",
]


@EVERY
@pytest.mark.parametrize("text", NASTY)
def test_a_question_is_never_trained_whatever_it_says(
    name: str, text: str, tokenizers: dict[str, Any]
) -> None:
    one, case = tokenizers[name], CASES[name]
    rows = encode(one, chat(text, "First.", text, "Second."))
    texts = [part for row in rows for part in trained_texts(one, row)]
    assert texts == expected(case, ["First.", "Second."])


@EVERY
@pytest.mark.parametrize("text", [text for text in NASTY if text != "<think>"])
def test_an_answer_is_trained_whatever_it_says(
    name: str, text: str, tokenizers: dict[str, Any]
) -> None:
    one, case = tokenizers[name], CASES[name]
    rows = encode(one, chat("Hi", text, "Bye", text))
    texts = [part for row in rows for part in trained_texts(one, row)]
    meant = [one.decode(one(part, add_special_tokens=False)["input_ids"]) for part in
             expected(case, [text, text])]  # fmt: skip
    assert [part.strip() for part in texts] == [part.strip() for part in meant]


WORDS = st.text(
    st.sampled_from("ab ZÄé 1.,!?\n\t'\"<|>/#{}中😀\u200b\u0301"), min_size=1, max_size=30
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from(sorted(CASES)))
def test_any_chat_trains_its_answers_and_no_more(
    tokenizers: dict[str, Any], pairs: list[tuple[str, str]], name: str
) -> None:
    pairs = [(a, b) for a, b in pairs if a.strip() and b.strip()]
    if not pairs:
        return
    one, case = tokenizers[name], CASES[name]
    rows = encode(one, chat(*(text for pair in pairs for text in pair)))
    texts = "".join(part for row in rows for part in trained_texts(one, row))
    meant = "".join(expected(case, [answer for _, answer in pairs]))
    assert "".join(texts.split()) == "".join(meant.split())


def test_calls_are_trained_as_the_template_writes_them(tokenizers: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "keys"}}}
    messages = [
        turn("user", "Where are my keys?"),
        turn("assistant", "", tool_calls=[call]),
        turn("tool", "on the table"),
        turn("assistant", "On the table."),
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    one = tokenizers["qwen2"]
    (found,) = Encoder(one).encode([Chat(messages, tools)])
    assert isinstance(found, list)
    (row,) = found
    assert isinstance(row, TokenRow)
    assert trained_texts(one, row) == [
        '\n<tool_call>\n{"name": "find", "arguments": {"what": "keys"}}\n</tool_call><|im_end|>',
        "On the table.<|im_end|>",
    ]
    assert '"parameters": {}' in one.decode(row.input_ids.tolist())


def test_a_template_without_tools_gets_them_as_text(tokenizers: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "keys"}}}
    messages = [
        turn("user", "Where are my keys?"),
        turn("assistant", "Let me look.", tool_calls=[call]),
        turn("tool", "on the table"),
        turn("assistant", "On the table."),
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    for name in ("llama3", "gemma3", "mistral"):
        one, case = tokenizers[name], CASES[name]
        (found,) = Encoder(one).encode([Chat(messages, tools)])
        assert isinstance(found, list), found
        rows = [row for row in found if isinstance(row, TokenRow)]
        assert [text.strip() for row in rows for text in trained_texts(one, row)] == [
            'Let me look.\n<tool_call>\n{"name": "find", "arguments": {"what": "keys"}}\n'
            f"</tool_call>{case.end}",
            f"On the table.{case.end}",
        ]
        whole = one.decode(rows[-1].input_ids.tolist())
        assert "<tool_response>\non the table\n</tool_response>" in whole
        assert '{"name": "find", "parameters": {}}' in whole


def test_where_no_token_ends_an_answer_the_end_of_text_does(tokenizer: Any) -> None:
    one = copy.deepcopy(tokenizer)
    one.chat_template = (TEMPLATES / "plain.jinja").read_text()
    (row,) = encode(one, chat("Hi", "Hello.", "Bye", "So long."))
    assert "".join(trained_texts(one, row)).endswith(f"So long.{one.eos_token}")
    assert trained_texts(one, row)[0].startswith("Hello.")
    assert "###" not in "".join(trained_texts(one, row))


def test_what_opens_the_next_turn_ends_an_answer_where_the_model_stops_at_it(
    tokenizer: Any,
) -> None:
    import trl

    one = copy.deepcopy(tokenizer)
    one.add_tokens(["<|user|>", "<|assistant|>", "<|observation|>"], special_tokens=True)
    folder = Path(trl.__file__).parent / "chat_templates"
    one.chat_template = (folder / "glm4moe.jinja").read_text()
    texts = ("Hi", "Hello.", "Bye", "So long.")
    eos = one.convert_tokens_to_ids([one.eos_token, "<|user|>"])
    (found,) = Encoder(one, eos=eos).encode([Chat(chat(*texts))])
    assert isinstance(found, list)
    assert isinstance(found[0], TokenRow)
    reference = one.apply_chat_template(
        chat(*texts),
        chat_template=(folder / "glm4moe_training.jinja").read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    flags = np.array(reference["assistant_masks"], dtype=np.bool_)
    first, last = [
        one.decode(reference["input_ids"][start:end])
        for start, end, trained in runs(flags)
        if trained
    ]
    assert first.endswith("Hello.<|user|>")
    last = last.removesuffix("<|user|>") + one.eos_token
    assert trained_texts(one, found[0]) == [first, last]
    assert trained_texts(one, encode(one, chat(*texts))[0])[0] == first.removesuffix("<|user|>")


def test_a_tokenizer_without_a_template_reads_plain_text_only(tokenizer: Any) -> None:
    one = copy.deepcopy(tokenizer)
    one.chat_template = None
    encoder = Encoder(one)
    (found,) = encoder.encode([Chat([], text="Only words.")])
    assert isinstance(found, list)
    (row,) = found
    assert isinstance(row, TokenRow)
    assert one.decode(row.input_ids.tolist()) == f"Only words.{one.eos_token}"
    assert row.trained.tolist() == [False] + [True] * (len(row) - 1)
    with pytest.raises(DataError, match="has no chat template"):
        encoder.encode([Chat(chat("Hi", "Hello."))])


@pytest.mark.parametrize(
    "template", ["{{ nothing.at.all }}", "always the same", "{{ messages[0].content }}", "{% if %}"]
)
def test_a_template_that_cannot_show_an_answer_is_refused(tokenizer: Any, template: str) -> None:
    one = copy.deepcopy(tokenizer)
    one.chat_template = template
    with pytest.raises(DataError, match="chat template") as caught:
        Encoder(one).masker()
    assert "chat_template.jinja" in caught.value.fix


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "slow"

    with pytest.raises(DataError, match="has no fast version"):
        Encoder(Slow())


def shipped_templates() -> list[Path]:
    """Real templates of many families, as TRL carries them to recognise models."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return sorted(path for path in folder.glob("*.jinja") if "training" not in path.stem)


@pytest.mark.parametrize("path", shipped_templates(), ids=lambda path: path.stem)
def test_real_templates_train_every_answer_whole(path: Path, tokenizer: Any) -> None:
    one = copy.deepcopy(tokenizer)
    one.chat_template = path.read_text()
    for texts in (
        ("Hi there", " Hello to you. ", "Bye now", "So long."),
        ("Hi there", "<think>\nhm one\n</think>\n\nHello to you.", "Bye now",
         "<think>\nhm two\n</think>\n\nSo long."),
    ):  # fmt: skip
        rows = encode(one, chat(*texts))
        trained = " ".join(part for row in rows for part in trained_texts(one, row))
        for words in ("Hello to you.", "So long.", *(["hm one", "hm two"] * ("hm" in texts[1]))):
            assert trained.count(words) == 1, trained
        assert "there" not in trained
        assert "now" not in trained
