"""Checks, personal data, duplicates, the split, and what tokenizers make of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strixft.data import checks, word_cache
from strixft.data.checks import any_of, check_chat, oddities, texts_of
from strixft.data.duplicates import (
    content_hash,
    first_of_each,
    leaks,
    near_duplicates,
    question_hash,
    sketch,
    split_rows,
    uniform,
)
from strixft.data.encode import Encoder, TokenRow
from strixft.data.row_report import example, spread
from strixft.data.too_long import cut, divide, halves, windows
from strixft.data.word_cache import Words, WordsDifferError
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def chat(*texts: str, system: str | None = None) -> Chat:
    """Turns of user and assistant."""
    turns = [turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Chat([turn("system", system), *turns] if system else turns)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def row_of(tokenizer: Any, one: Chat) -> TokenRow:
    """The one row of a chat."""
    (found,) = Encoder(tokenizer).encode([one])
    assert isinstance(found, list)
    (row,) = found
    assert isinstance(row, TokenRow)
    return row


# Checks.


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (Chat([turn("user", "a")]), "no_answer"),
        (Chat([turn("system", "a")]), "no_answer"),
        (chat("a", " \n"), "empty_turn"),
        (chat("", "b"), "empty_turn"),
        (Chat([turn("user", "a"), turn("user", "b"), turn("assistant", "c")]), "same_role_twice"),
        (Chat([turn("user", "a"), turn("assistant", "b", train=False)]), "nothing_to_train"),
        (Chat(chat("a", "b").messages, rejected=chat("a", "").messages), "empty_turn"),
    ],
)
def test_a_chat_that_cannot_be_trained_is_a_fault(wrong: Chat, kind: str) -> None:
    with pytest.raises(RowFault) as caught:
        check_chat(wrong)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "right",
    [
        chat("a", "b", "c", "d"),
        chat("a", "b", system=" "),
        Chat([turn("assistant", "Hello."), turn("user", "a"), turn("assistant", "b")]),
        Chat([turn("user", "a"), turn("assistant", "b"), turn("user", "c")]),
        Chat([turn("user", "a"), turn("assistant", "", tool_calls=[{}]), turn("tool", ""),
              turn("assistant", "b")]),
        Chat([], text="words"),
    ],
)  # fmt: skip
def test_a_chat_that_can_be_trained_is_none(right: Chat) -> None:
    check_chat(right)


@pytest.mark.parametrize("text", ["plain\ttext\r\nin lines", "Grüße 😀 مرحبا", "a\u200db"])
def test_usual_text_hides_nothing(text: str) -> None:
    assert list(oddities(chat("a", text), any_of(["<|im_end|>"]))) == []


def test_hidden_characters_and_tokens_are_told_with_their_message() -> None:
    specials = any_of(["<|im_end|>", "<|im_start|>"])
    found = list(oddities(chat("a\x1b[2J", "b<|im_end|>"), specials))
    assert found == [
        ("hidden_characters", "message 1 has the hidden character U+001B at place 1"),
        ("special_token", "message 2 contains the token '<|im_end|>'"),
    ]


def test_a_token_is_told_where_a_longer_one_begins_with_it_and_in_calls_too() -> None:
    call = {"type": "function", "function": {"name": "say", "arguments": {"what": ["</s>"]}}}
    told = Chat([turn("user", "<s>[INST]<s>"), turn("assistant", "", tool_calls=[call])])
    assert [
        text for _, text in oddities(told, any_of(["<s>", "</s>", "<s>[INST]", "<think>"]))
    ] == [
        "message 1 contains the token '<s>'",
        "message 1 contains the token '<s>[INST]'",
        "message 2 contains the token '</s>'",
    ]
    assert texts_of(told) == ["<s>[INST]<s>", "", "</s>"]


def test_what_stands_for_a_picture_is_told() -> None:
    assert list(oddities(chat("<image>\nWhat is it?", "A nas."), None)) == [
        ("placeholder", "message 1 has '<image>', and only text is trained")
    ]


def test_a_question_that_asks_to_be_trained_is_told() -> None:
    messages = [turn("user", "a", train=True), turn("assistant", "b")]
    (found,) = oddities(Chat(messages), None)
    assert found == ("flag_unused", "message 1, the user's, asks to be trained")


def test_nulls_in_calls_and_tools_are_told_once_each() -> None:
    call = {"function": {"name": "lamp", "arguments": {"a": {"b": [None]}, "c": None}}}
    tool = {"function": {"name": "lamp", "parameters": {"properties": {"c": None}}}}
    messages = [turn("user", "x"), turn("assistant", "", tool_calls=[call])]
    assert list(oddities(Chat(messages, [tool]), None)) == [
        ("null", "message 2 calls lamp with null for 'a.b'"),
        ("null", "the tools have lamp with null for 'properties.c'"),
    ]


# Personal data.

KEYS = [
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "a1" * 18,
    "github_pat_" + "A1" * 15,
    "sk-" + "proj-abcdEFGH1234" * 2,
    "hf_" + "aB3" * 12,
    "xoxb-1234567890-abcdef",
    "AIza" + "b" * 35,
    "sk_live_" + "a1" * 12,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk",
    "-----BEGIN RSA PRIVATE KEY-----",
    "api_key = 'abcdef0123456789'",
    "PASSWORD: hunter2hunter2",
]
MAILS = ["anna.b+c@mail.org", "x@sub.domain.co.uk"]
PHONES = ["+49 30 1234567", "+1-202-555-0143", "(212) 555-0100", "212-555-0100", "0171 1234567"]
NOTHING = [
    "anna@example.com",
    "me@host.invalid",
    "In 1990-2000 there were 12,345,678 of them.",
    "2024-01-31 12:30:45",
    "The key is under the mat; the token economy; password: yes",
    "v1.2.3-4567 192.168.100.200",
    "3.14159265358979",
    "16-3-4=9 and 9*2=18 and 1234567890",
    "task-force, risk-free, ghost_town",
]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(t, "secret") for t in KEYS] + [(t, "email") for t in MAILS] + [(t, "phone") for t in PHONES],
)
def test_what_looks_personal_is_found_shown_masked_and_masked_on_request(
    text: str, kind: str
) -> None:
    sentence = f"Here: {text}, you see."
    found = checks.find(sentence)
    assert [one for one, _ in found] == [kind]
    assert text not in found[0][1]
    assert checks.mask_text(sentence).startswith(f"Here: [{kind}]")


@pytest.mark.parametrize("text", NOTHING)
def test_what_only_resembles_it_is_not(text: str) -> None:
    assert checks.find(text) == []
    assert checks.mask_text(text) == text


def test_a_chat_is_masked_in_its_calls_too() -> None:
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": [MAILS[0]]}}}
    messages = [turn("user", MAILS[0]), turn("assistant", "Sent.", tool_calls=[call])]
    masked = checks.mask_chat(Chat(messages, rejected=chat(PHONES[0], "x").messages))
    assert MAILS[0] not in json.dumps(masked.messages)
    assert masked.messages[1]["tool_calls"][0]["function"]["arguments"] == {"to": ["[email]"]}
    assert masked.rejected is not None
    assert masked.rejected[0]["content"] == "[phone]"


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_can_be_searched_and_masked(text: str) -> None:
    assert checks.find(checks.mask_text(text)) == [] or checks.find(text)


# Duplicates, leaks, split.


def test_a_row_is_known_by_what_it_says_and_nothing_else() -> None:
    one = chat("a", "b")
    assert content_hash(one) == content_hash(chat("a", "b"))
    others = [chat("a", "c"), chat("b", "a"), chat("ab", ""), chat("a", "b", system="s"),
              Chat(one.messages, tools=[{"name": "f"}]), Chat(one.messages, label=True),
              Chat(one.messages, rejected=one.messages), Chat([], text="a"),
              Chat([turn("user", "a"), turn("assistant", "b", train=False)])]  # fmt: skip
    assert len({content_hash(other) for other in (one, *others)}) == 10


def test_a_question_is_the_same_in_other_case_and_spaces() -> None:
    assert question_hash(chat("What  is it?", "x")) == question_hash(chat("what is\nIT?", "y"))
    assert question_hash(chat("a", "b", "c", "d")) != question_hash(chat("c", "d"))


def test_the_first_of_equal_rows_is_named() -> None:
    hashes = np.array([5, 7, 5, 9, 7, 5], dtype=np.uint64)
    assert first_of_each(hashes).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of_each(hashes[:0]).tolist() == []


def test_texts_that_share_most_words_are_near_and_others_are_not() -> None:
    rng = random.Random(1)
    vocabulary = [f"word{n}" for n in range(2000)]
    texts = [" ".join(rng.choices(vocabulary, k=120)) for _ in range(200)]
    changed = texts[17].split()
    changed[60] = "other"
    texts += [" ".join(changed), texts[33].upper(), " ".join(rng.choices(vocabulary, k=120)), ""]
    found = near_duplicates(b"".join(map(sketch, texts))).tolist()
    assert len(found) == len(texts)
    assert found[:200] == list(range(200))
    assert found[200:] == [17, 33, 202, 203]
    assert near_duplicates(b"").tolist() == []


def test_a_held_out_row_that_asks_what_a_training_row_asks_is_a_leak() -> None:
    question = np.array([4, 8, 4, 6, 8, 2], dtype=np.uint64)
    train, validation = np.array([0, 1, 3]), np.array([2, 4, 5])
    assert leaks(question, train, validation) == [(2, 0), (4, 1)]
    assert leaks(question, train, validation[:0]) == []
    assert leaks(question, train[:0], validation) == []


def keys(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def ones(count: int) -> Any:
    return np.ones(count)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5])
def test_the_share_that_is_held_out_is_near_what_was_asked(fraction: float) -> None:
    split = split_rows(keys(20_000), ones(20_000) > 0, ones(20_000), fraction)
    assert len(split.validation) / 20_000 == pytest.approx(fraction, abs=0.01)
    assert sorted([*split.train, *split.validation]) == list(range(20_000))


def test_a_row_keeps_its_side_when_the_set_grows_and_is_sorted_anew() -> None:
    many = keys(5000)
    small = split_rows(many[:1000], ones(1000) > 0, ones(1000), 0.1)
    order = np.random.default_rng(3).permutation(5000)
    large = split_rows(many[order], ones(5000) > 0, ones(5000), 0.1)
    held_out = set(many[order][large.validation].tolist())
    assert {row for row in range(1000) if int(many[row]) in held_out} == set(small.validation)


@given(st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_one_row_is_always_trained_and_of_two_one_is_held_out(
    count: int, fraction: float, seed: int
) -> None:
    split = split_rows(keys(count, seed), ones(count) > 0, ones(count), fraction)
    assert len(split.train) >= 1
    assert len(split.validation) >= (1 if count > 1 and fraction > 0 else 0)
    assert len(split.train) + len(split.validation) == count


def test_rows_of_one_group_stay_together() -> None:
    groups = np.repeat(keys(300), 7)
    split = split_rows(groups, ones(2100) > 0, ones(2100), 0.3)
    assert not set(groups[split.train].tolist()) & set(groups[split.validation].tolist())


def test_weights_take_rows_more_or_less_often_and_never_hold_one_out_twice() -> None:
    weights = np.repeat([2.0, 0.5, 1.0, 1.5], 5000)
    split = split_rows(keys(20_000), ones(20_000) > 0, weights, 0.1)
    taken = np.bincount(split.train // 5000, minlength=4) / 4500
    assert taken == pytest.approx([2, 0.5, 1, 1.5], abs=0.06)
    assert len(set(split.validation.tolist())) == len(split.validation)
    assert np.bincount(split.validation // 5000)[1] == pytest.approx(250, abs=50)


def test_rows_that_take_no_part_are_on_no_side() -> None:
    kept = np.arange(100) % 3 > 0
    split = split_rows(keys(100), kept, ones(100), 0.2)
    assert sorted([*split.train, *split.validation]) == np.flatnonzero(kept).tolist()


def test_numbers_of_hashes_spread_evenly_under_any_salt() -> None:
    hashes = keys(10_000)
    for salt in (0, 1, 2):
        counts, _ = np.histogram(uniform(hashes, salt), 10, (0, 1))
        assert counts.min() > 900
    assert abs(np.corrcoef(uniform(hashes), uniform(hashes, 1))[0, 1]) < 0.05


# Words.


def same_as_whole(tokenizer: Any, texts: list[str]) -> None:
    """The words give the tokens and the places that the tokenizer gives."""
    backend = tokenizer.backend_tokenizer
    known = Words(backend)
    assert known.usable
    for _ in range(2):  # cold and warm
        made = known.encode_batch(texts)
        true = backend.encode_batch(texts, add_special_tokens=False)
        for text, mine, whole in zip(texts, made, true, strict=True):
            assert list(mine.ids) == whole.ids, text
            for place in range(0, len(text), 7):
                token = mine.char_to_token(place)
                # a character that is not in the vocabulary at all has no token to compare
                if token is not None and whole.char_to_token(place) is not None:
                    start, end = whole.token_to_chars(token)
                    assert start - 1 <= place < max(end, start + 1), (text, place)


def test_words_give_the_tokens_of_whole_texts(tokenizer: Any) -> None:
    rng = random.Random(5)
    pieces = [
        *("Hello", "don't", " ", "  ", "\n", "\n\n", "\t", ".", "...", "12345", "é", "中文", "😀"),
        *("<|im_start|>", "<|im_end|>", "user\n", "x" * 60, "a_b", "$x^2$", "مرحبا", "\u00a0"),
        *("\r\n", "'s", "I'll", "((", "\u0301", "\u3000", "0x1F", "https://a.b/c?d=e"),
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 60))) for _ in range(400)]
    same_as_whole(tokenizer, [*texts, *(" ".join(rng.choices(pieces, k=40)) for _ in range(100))])


@given(st.lists(st.text(max_size=60), min_size=40, max_size=40))
@settings(max_examples=40, deadline=None)
def test_words_give_the_tokens_of_any_texts(tokenizer: Any, texts: list[str]) -> None:
    same_as_whole(tokenizer, texts)


def test_a_tokenizer_that_does_not_split_at_spaces_is_asked_whole() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    plain = Tokenizer(models.BPE({"a": 0, " ": 1, "a ": 2, "a a": 3}, [("a", " "), ("a ", "a")]))
    assert not Words(plain).usable  # it splits nothing
    plain.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    assert not Words(plain).usable  # it splits at line ends alone
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not Words(plain).usable
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not Words(plain).usable
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.normalizer = normalizers.Lowercase()
    assert not Words(plain).usable


def test_words_that_lie_are_found_out(tokenizer: Any) -> None:
    known = Words(tokenizer.backend_tokenizer)
    texts = [f"row {n} says something" for n in range(100)]
    known.encode_batch(texts)
    known._known[" something"] = np.array([1, 2, 3], dtype=np.int32).tobytes()
    with pytest.raises(WordsDifferError):
        known.encode_batch(texts)
    known.usable = False
    assert known.encode_batch(texts)[5].ids == (
        tokenizer.backend_tokenizer.encode(texts[5], add_special_tokens=False).ids
    )


def test_no_more_words_are_remembered_than_are_worth_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "MOST_CHARACTERS", 2000)
    known = Words(tokenizer.backend_tokenizer)
    for start in range(0, 4000, 200):
        known.encode_batch([f"number {n} {'and so on ' * 20}" for n in range(start, start + 40)])
        assert sum(map(len, known._known)) < 2400
    before = len(known._known)
    known.encode_batch(["y" * 80 + str(number) for number in range(40)])
    assert len(known._known) <= before  # words that long are not remembered


# Rows that are too long.


def test_a_chat_is_divided_between_exchanges_and_keeps_its_system_message() -> None:
    parts = halves(chat("a" * 90, "b", "c", "d", "e" * 90, "f", system="s"))
    assert parts is not None
    assert [[m["content"][:1] for m in part.messages] for part in parts] == [
        ["s", "a", "b"],
        ["s", "c", "d", "e", "f"],
    ]
    assert halves(chat("a", "b")) is None


def test_no_answer_is_cut_where_a_chat_is_divided(tokenizer: Any) -> None:
    turns = [f"Question {n}? " * 4 if n % 2 == 0 else f"Answer {n}. " * 9 for n in range(24)]
    found = divide(Encoder(tokenizer), chat(*turns), 160)
    rows = [row for row in found if isinstance(row, TokenRow)]
    assert len(rows) == len(found) > 1
    assert all(len(row) <= 160 for row in rows)
    text = "".join(tokenizer.decode(row.input_ids[row.trained].tolist()) for row in rows)
    assert text == "".join(f"{turn}<|im_end|>" for turn in turns[1::2])


def test_text_is_divided_into_stretches_without_loss(tokenizer: Any) -> None:
    row = row_of(tokenizer, Chat([], text="All work and no play. " * 40))
    parts = windows(row, 64)
    assert [token for part in parts for token in part.input_ids.tolist()] == row.input_ids.tolist()
    assert not any(part.trained[0] for part in parts)


def test_a_row_that_is_cut_keeps_its_start_or_is_nothing(tokenizer: Any) -> None:
    row = row_of(tokenizer, chat("Hi", "one two three four five six seven eight"))
    short = cut(row, len(row) - 3)
    assert short is not None
    assert short.input_ids.tolist() == row.input_ids.tolist()[:-3]
    assert cut(row, row.prompt_tokens) is None


def bos_tokenizer(tiny_model: Path) -> Any:
    """The embedded model's tokenizer, as one that begins every text with a token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|im_start|>")
    start = [("<|im_start|>", made.convert_tokens_to_ids("<|im_start|>"))]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=start
    )
    return made


@pytest.mark.parametrize("begins", ["", "<|im_start|>"])
@pytest.mark.parametrize("ends", ["", "<|im_end|>", "<|im_end|>\n"])
def test_text_that_has_its_first_and_last_token_gets_no_second(
    tiny_model: Path, begins: str, ends: str
) -> None:
    known = bos_tokenizer(tiny_model)
    assert known("a")["input_ids"][0] == known.bos_token_id
    ids = row_of(known, Chat([], text=f"{begins}Ping nas.{ends}")).input_ids.tolist()
    assert ids.count(known.bos_token_id) == ids.count(known.eos_token_id) == 1
    assert ids[0] == known.bos_token_id
    assert known.decode(ids).rstrip() == "<|im_start|>Ping nas.<|im_end|>"


def test_a_text_that_is_read_in_stretches_begins_and_ends_once(tiny_model: Path) -> None:
    known = bos_tokenizer(tiny_model)
    encoder = Encoder(known, max_length=64)
    text = "All work and no play. " * 2000
    parts = divide(encoder, Chat([], text=text), 64)
    assert len(text) > (encoder.most_characters or 0)
    ids = [token for part in parts if isinstance(part, TokenRow) for token in part.input_ids]
    assert ids.count(known.bos_token_id) == ids.count(known.eos_token_id) == 1
    assert known.decode(ids) == f"<|im_start|>{text}<|im_end|>"


# The preview.


def test_a_preview_shows_the_very_tokens_in_runs(tokenizer: Any) -> None:
    row = row_of(tokenizer, chat("Hi", "Hello."))
    columns = {"input_ids": row.input_ids.tolist(), "trained": row.trained.tolist()}
    shown = example({**columns, "row": 3, "part": 0}, tokenizer, "a.jsonl")
    assert [flag for _, flag in shown["runs"]] == [False, True, False]
    assert shown["runs"][1][0] == "Hello.<|im_end|>"
    assert "".join(text for text, _ in shown["runs"]).endswith("Hello.<|im_end|>\n")


def test_a_preview_of_a_chat_of_many_turns_shows_its_start_and_its_end(tokenizer: Any) -> None:
    row = row_of(tokenizer, chat(*(f"turn {n}" for n in range(100))))
    columns = {"input_ids": row.input_ids.tolist(), "trained": row.trained.tolist()}
    shown = example({**columns, "row": 1, "part": 0}, tokenizer, "a.jsonl")
    assert len(shown["runs"]) == 40
    assert shown["runs_left_out"] == 61
    assert "turn 1<" in shown["runs"][1][0]
    assert "turn 99<" in shown["runs"][-2][0]


def test_a_preview_goes_from_the_shortest_row_to_the_longest() -> None:
    lengths = np.array([30, 10, 50, 20, 40, 60])
    assert lengths[spread(lengths, 5)].tolist() == [10, 20, 30, 50, 60]
    assert spread(lengths[:2]) == [1, 0]
    assert spread(lengths[:0]) == []
