"""A row becomes a chat, or says in what it is not of its format."""

import json
from typing import Any

import pytest

from strixft.formats import FORMATS, ROLES, Format, RowFault, detect_format


def messages(*rows: Any) -> dict[str, Any]:
    return {"messages": list(rows)}


def fault_of(row: dict[str, Any], name: str = "messages") -> RowFault:
    with pytest.raises(RowFault) as caught:
        FORMATS[name].to_messages(row)
    return caught.value


@pytest.mark.parametrize("shape", FORMATS.values(), ids=lambda shape: shape.name)
def test_the_example_of_a_format_becomes_a_chat_with_an_answer(shape: Format) -> None:
    chat = shape.to_messages(shape.example)
    assert [message["role"] for message in chat] == ["user", "assistant"]


@pytest.mark.parametrize("shape", FORMATS.values(), ids=lambda shape: shape.name)
def test_a_format_is_found_by_the_columns_of_its_example(shape: Format) -> None:
    assert detect_format(frozenset(shape.example)) is shape


def test_other_columns_beside_a_formats_own_do_not_matter() -> None:
    assert detect_format(frozenset({"id", "messages"})) is FORMATS["messages"]


def test_unknown_columns_are_no_format() -> None:
    assert detect_format(frozenset({"prompt", "answer"})) is None


def test_a_prompt_and_its_completion_are_a_chat_of_two() -> None:
    row = {"prompt": "Ping nas.", "completion": "Done."}
    assert FORMATS["prompt-completion"].to_messages(row) == [
        {"role": "user", "content": "Ping nas."},
        {"role": "assistant", "content": "Done."},
    ]


@pytest.mark.parametrize("role", ROLES)
def test_a_known_role_is_taken(role: str) -> None:
    chat = FORMATS["messages"].to_messages(messages({"role": role, "content": "x"}))
    assert chat == [{"role": role, "content": "x"}]


def test_an_unknown_role_is_named_with_its_message_and_the_known_ones() -> None:
    fault = fault_of(messages({"role": "user", "content": "x"}, {"role": "human", "content": "y"}))
    assert fault.kind == "unknown_role"
    assert fault.problem == (
        "message 2 has the role 'human'; known are system, developer, user, assistant, tool"
    )


def test_a_role_that_is_huge_is_cut_short() -> None:
    fault = fault_of(messages({"role": ["x"] * 10_000, "content": "y"}))
    assert len(fault.problem) < 200


@pytest.mark.parametrize("row", [{}, {"messages": []}, {"messages": "hello"}, {"messages": {}}])
def test_a_row_without_messages_is_a_fault(row: dict[str, Any]) -> None:
    fault = fault_of(row)
    assert fault.kind == "no_messages"
    assert fault.problem == "the row has no 'messages' list, or an empty one"


def test_a_message_that_is_no_mapping_is_a_fault() -> None:
    assert fault_of(messages("hello")).problem == "message 1 has no 'role': 'hello'"


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
def test_a_message_without_content_is_a_fault(message: dict[str, Any]) -> None:
    fault = fault_of(messages(message))
    assert fault.kind == "no_text"
    assert fault.problem == "content of message 1 is missing or null"


def test_content_that_is_no_text_is_a_fault() -> None:
    fault = fault_of(messages({"role": "user", "content": [{"type": "text", "text": "hi"}]}))
    assert fault.kind == "not_text"
    assert fault.problem == (
        "content of message 1 should be text, it is list: [{'type': 'text', 'text': 'hi'}]"
    )


def test_a_completion_that_is_missing_is_a_fault() -> None:
    fault = fault_of({"prompt": "hi"}, "prompt-completion")
    assert fault.problem == "'completion' is missing or null"


def test_half_a_character_is_a_fault() -> None:
    row = json.loads(r'{"prompt": "hi", "completion": "ok \ud83d"}')
    fault = fault_of(row, "prompt-completion")
    assert fault.kind == "not_unicode"
    assert fault.problem == ("'completion' has half a character at place 3: surrogates not allowed")


def test_a_whole_character_beyond_16_bits_is_text() -> None:
    row = json.loads(r'{"prompt": "hi", "completion": "ok \ud83d\ude00"}')
    assert FORMATS["prompt-completion"].to_messages(row)[1]["content"] == "ok 😀"
