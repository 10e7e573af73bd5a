"""A row becomes a chat, or says in what it is not of its format."""

import json
import pickle
from typing import Any

import pytest

from strixft.formats import FORMATS, ROLES, Format, RowFault, fitting, suggest_columns
from strixft.formats.messages import read_tools

CALL = {"name": "find", "arguments": {"what": "keys"}}


def messages(*rows: Any) -> dict[str, Any]:
    return {"messages": list(rows)}


def turns(row: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """Role and content of each message."""
    return [(m["role"], m["content"]) for m in FORMATS[name].to_chat(row).messages]


def fault_of(row: dict[str, Any], name: str = "messages") -> RowFault:
    with pytest.raises(RowFault) as caught:
        FORMATS[name].to_chat(row)
    return caught.value


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_the_example_of_a_format_becomes_a_chat_with_an_answer(form: Format) -> None:
    chat = form.to_chat(form.example)
    assert [m["role"] for m in chat.messages] == (["user", "assistant"] if not chat.text else [])


FOUND_AS = {"chosen": "preference", "thumbs-up": "thumbs"}
"""Formats that are chosen by name alone → what their columns show."""


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_format_is_found_by_the_columns_of_its_example(form: Format) -> None:
    found = [row.name for row in fitting(form.example)]
    assert found == [FOUND_AS.get(form.name, form.name)]
    assert form.detected is (form.name not in FOUND_AS)


def test_other_columns_beside_a_formats_own_do_not_matter() -> None:
    assert [form.name for form in fitting({"id": 7, "messages": []})] == ["messages"]


def test_unknown_columns_are_no_format() -> None:
    assert fitting({"prompt": "a", "answer": "b"}) == []


def test_columns_of_two_formats_are_both() -> None:
    row = {"text": "a", "instruction": "b", "output": "c"}
    assert [form.name for form in fitting(row)] == ["alpaca", "text"]


def test_a_format_that_needs_more_columns_hides_one_that_needs_fewer() -> None:
    row: dict[str, Any] = {"conversations": [], "chosen": {}, "rejected": {}}
    assert [form.name for form in fitting(row)] == ["preference"]


def test_a_label_that_is_no_thumb_is_a_plain_chat() -> None:
    assert [f.name for f in fitting({"messages": [], "label": "science"})] == ["messages"]
    assert [f.name for f in fitting({"messages": [], "label": True})] == ["thumbs"]


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"instruction": "a", "instances": [{"input": "", "output": "b"}]},
            {
                "instruction": "instruction",
                "input": "instances.0.input",
                "output": "instances.0.output",
            },
        ),
        ({"Question": "a", "Response": "b"}, {"question": "Question", "answer": "Response"}),
        ({"dialog": [{"role": "user", "content": "a"}]}, {"messages": "dialog"}),
        ({"a": 1, "b": 2}, None),
        ({}, None),
    ],
)
def test_a_mapping_is_suggested_where_one_is_near(
    row: dict[str, Any], mapping: dict[str, str] | None
) -> None:
    assert suggest_columns(row) == mapping


@pytest.mark.parametrize("role", ROLES)
def test_a_known_role_is_taken(role: str) -> None:
    assert turns(messages({"role": role, "content": "x"}), "messages") == [(role, "x")]


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("gpt", "assistant"), ("observation", "tool"), ("system", "system")],
)
def test_sharegpts_names_of_roles_are_known(name: str, role: str) -> None:
    row = {"conversations": [{"from": name, "value": "x"}]}
    assert turns(row, "sharegpt") == [(role, "x")]


def test_an_unknown_role_is_named_with_its_message_and_the_known_ones() -> None:
    fault = fault_of(messages({"role": "user", "content": "x"}, {"role": "bot", "content": "y"}))
    assert fault.kind == "unknown_role"
    assert fault.problem.startswith("message 2 has the role 'bot'; known are system, developer,")


@pytest.mark.parametrize("role", [["x"] * 10_000, {"a": 1}, 7, "x" * 10_000])
def test_a_role_that_is_no_word_is_cut_short(role: Any) -> None:
    fault = fault_of(messages({"role": role, "content": "y"}))
    assert fault.kind == "unknown_role"
    assert len(fault.problem) < 250


@pytest.mark.parametrize("row", [{}, {"messages": []}, {"messages": {}}, {"messages": 3}])
def test_a_row_without_messages_is_a_fault(row: dict[str, Any]) -> None:
    fault = fault_of(row)
    assert fault.kind == "no_messages"
    assert fault.problem == "the row has no 'messages' list, or an empty one"


@pytest.mark.parametrize("message", ["hello", None, 4, {"content": "x"}, {"role": None}])
def test_a_message_without_a_role_is_a_fault(message: Any) -> None:
    assert fault_of(messages(message)).kind == "bad_message"


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
def test_a_message_without_content_is_a_fault(message: dict[str, Any]) -> None:
    fault = fault_of(messages(message))
    assert fault.kind == "no_text"
    assert fault.problem == "content of message 1 is missing or null"


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there."}]
    assert turns(messages({"role": "user", "content": parts}), "messages") == [
        ("user", "Hello there.")
    ]


def test_a_part_that_is_an_image_is_a_fault() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "../../secret.png"}}]
    fault = fault_of(messages({"role": "user", "content": parts}))
    assert fault.kind == "not_text"
    assert "type 'image_url'; only text is trained" in fault.problem


def test_half_a_character_is_a_fault() -> None:
    row = json.loads(r'{"prompt": "hi", "completion": "ok \ud83d"}')
    fault = fault_of(row, "prompt-completion")
    assert fault.kind == "not_unicode"
    assert fault.problem == "'completion' has half a character at place 3: surrogates not allowed"


def test_a_whole_character_beyond_16_bits_is_text() -> None:
    row = json.loads(r'{"prompt": "hi", "completion": "ok \ud83d\ude00"}')
    assert turns(row, "prompt-completion")[1] == ("assistant", "ok 😀")


@pytest.mark.parametrize("flag", ["train", "weight", "loss_weight", "loss"])
def test_an_answer_can_be_shown_and_not_trained(flag: str) -> None:
    row = messages({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", flag: 0})
    assert FORMATS["messages"].to_chat(row).messages[1]["train"] is False


@pytest.mark.parametrize("value", [0.5, 2, "yes"])
def test_a_weight_between_is_refused(value: Any) -> None:
    row = messages({"role": "assistant", "content": "b", "weight": value})
    assert fault_of(row).kind == "bad_weight"


def test_calls_have_their_arguments_as_data() -> None:
    written = {"function": {"name": "find", "arguments": json.dumps(CALL["arguments"])}}
    row = messages({"role": "assistant", "content": None, "tool_calls": [written]})
    (message,) = FORMATS["messages"].to_chat(row).messages
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }


def test_a_sharegpt_call_joins_the_words_before_it() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Where are my keys?"},
            {"from": "gpt", "value": "Let me look."},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "[]"},
        ],
        "tools": json.dumps([{"name": "find", "parameters": {}}]),
    }
    chat = FORMATS["sharegpt"].to_chat(row)
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[1]["tool_calls"][0]["function"] == CALL
    assert chat.tools == [{"type": "function", "function": {"name": "find", "parameters": {}}}]


@pytest.mark.parametrize("value", ["{no json", "[1]", '{"arguments": {}}', "7"])
def test_a_call_that_is_none_is_a_fault(value: str) -> None:
    row = {"conversations": [{"from": "function_call", "value": value}]}
    assert fault_of(row, "sharegpt").kind == "bad_tool_call"


@pytest.mark.parametrize("value", ["{no json", "[1]", {"a": 1}, [{"parameters": {}}], 3])
def test_tools_that_are_none_are_a_fault(value: Any) -> None:
    with pytest.raises(RowFault, match="tools"):
        read_tools(value)


@pytest.mark.parametrize("value", [None, "", " ", [], "[]"])
def test_no_tools_are_none(value: Any) -> None:
    assert read_tools(value) is None


def test_reasoning_apart_stands_before_the_answer() -> None:
    row = messages({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"})
    assert turns(row, "messages") == [("assistant", "<think>\n2 + 2\n</think>\n\n4")]


def test_alpaca_puts_the_input_under_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."}
    assert turns(row, "alpaca") == [
        ("system", "Be brief."),
        ("user", "Add.\n\n1, 2"),
        ("assistant", "3"),
    ]
    assert turns({**row, "input": "", "system": None}, "alpaca")[0] == ("user", "Add.")


def test_alpaca_with_history_has_all_its_turns() -> None:
    row = {"instruction": "And now?", "output": "Now.", "history": [["Hello?", "Hello."]]}
    assert [role for role, _ in turns(row, "alpaca")] == ["user", "assistant"] * 2
    assert fault_of({**row, "history": ["Hello?"]}, "alpaca").kind == "bad_history"


def test_a_prompt_may_be_a_list_of_messages() -> None:
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert turns(row, "prompt-completion") == [("system", "s"), ("user", "u"), ("assistant", "a")]


def test_messages_may_stand_in_a_cell_as_json() -> None:
    text = json.dumps([{"role": "user", "content": "u"}])
    assert turns({"messages": text}, "messages") == [("user", "u")]


USER, GOOD, BAD = (
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)
PAIRS: list[dict[str, Any]] = [
    {"prompt": "u", "chosen": "good", "rejected": "bad"},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "u", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {
        "conversations": [{"from": "human", "value": "u"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
]


@pytest.mark.parametrize("row", PAIRS)
def test_pairs_are_read_in_all_their_shapes(row: dict[str, Any]) -> None:
    assert [form.name for form in fitting(row)] == ["preference"]
    chat = FORMATS["preference"].to_chat(row)
    assert [m["content"] for m in chat.messages] == ["u", "good"]
    assert chat.rejected is not None
    assert [m["content"] for m in chat.rejected] == ["u", "bad"]
    assert turns(row, "chosen") == [("user", "u"), ("assistant", "good")]


def test_a_pair_without_a_prompt_or_a_difference_is_a_fault() -> None:
    assert fault_of({"chosen": "good", "rejected": "bad"}, "preference").kind == "no_prompt"
    same = {"prompt": "u", "chosen": "good", "rejected": "good"}
    assert fault_of(same, "preference").kind == "same_answers"


def test_thumbs_keep_their_label_and_thumbs_up_leaves_the_others_out() -> None:
    row = {"messages": [USER, GOOD], "label": True}
    assert FORMATS["thumbs"].to_chat(row).label is True
    assert turns(row, "thumbs-up")[-1] == ("assistant", "good")
    assert fault_of({**row, "label": False}, "thumbs-up").kind == "not_wanted"
    assert fault_of({**row, "label": "maybe"}, "thumbs").kind == "bad_label"


def test_a_fault_can_travel_between_processes() -> None:
    fault = pickle.loads(pickle.dumps(RowFault("kind", "what is wrong")))
    assert (fault.kind, fault.problem, str(fault)) == ("kind", "what is wrong", "what is wrong")
