"""A row becomes a chat, or says in what it is not of its format."""

import datetime
import json
import pickle
from typing import Any

import pytest
import strategies
from hypothesis import given, settings

from strixft.formats.faults import RowFault
from strixft.formats.known_formats import FORMATS, Format, fitting, suggest_columns
from strixft.formats.messages import ROLES, Chat, read_tools

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
    for thumb in (True, False, 0, 1, "true"):
        assert [f.name for f in fitting({"messages": [], "label": thumb})] == ["thumbs"]


def test_a_column_without_a_value_is_none() -> None:
    row: dict[str, Any] = {"messages": [], "conversations": None, "text": None, "label": None}
    assert [form.name for form in fitting(row)] == ["messages"]


def test_columns_of_a_pair_that_nothing_reads_are_named() -> None:
    row = {"prompt": "u", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    assert FORMATS["preference"].to_chat(row).unused == {"prompt", "messages"}


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
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            {"question": "question", "answer": "response", "system": "system_prompt"},
        ),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            {"instruction": "instruction", "output": "response", "input": "context"},
        ),
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


def test_flags_that_differ_are_refused_and_one_of_a_question_is_kept() -> None:
    answer = {"role": "assistant", "content": "b", "train": True, "weight": 0}
    assert fault_of(messages(answer)).problem == "message 1 has train and weight, which differ"
    row = messages({"role": "user", "content": "a", "train": True, "weight": 1})
    assert FORMATS["messages"].to_chat(row).messages[0]["train"] is True
    unmarked = messages({"role": "user", "content": "a", "weight": 0})
    assert "train" not in FORMATS["messages"].to_chat(unmarked).messages[0]


def test_calls_have_their_arguments_as_data() -> None:
    written = {"function": {"name": "find", "arguments": json.dumps(CALL["arguments"])}}
    row = messages({"role": "assistant", "content": None, "tool_calls": [written]})
    (message,) = FORMATS["messages"].to_chat(row).messages
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }


def test_a_call_keeps_the_order_of_its_keys_and_its_id() -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"arguments": {"b": 1, "a": 2}, "name": "f"},
    }
    row = messages({"role": "assistant", "content": "", "tool_calls": [call], "tool_call_id": "x"})
    (message,) = FORMATS["messages"].to_chat(row).messages
    assert json.dumps(message["tool_calls"]) == json.dumps([call])
    assert FORMATS["messages"].to_chat(row).unused == {"message.tool_call_id"}


def test_openais_earlier_calls_are_read() -> None:
    call = {"name": "find", "arguments": json.dumps(CALL["arguments"])}
    told = {"name": "find", "description": "finds", "parameters": {"type": "object"}}
    row = {
        **messages(
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "find", "content": "here"},
        ),
        "functions": [told],
    }
    chat = FORMATS["messages"].to_chat(row)
    assert chat.messages == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "tool", "content": "here", "name": "find"},
    ]
    assert chat.tools == [{"type": "function", "function": told}]


def deep(levels: int) -> Any:
    """A mapping in a mapping in a mapping."""
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


TOOL = {"type": "function", "function": {"name": "f", "strict": True}, "extra": 1}
FLAT = {"type": "function", "name": "f", "strict": True}


@pytest.mark.parametrize(
    ("value", "tools"),
    [
        ([TOOL], [TOOL]),
        ([FLAT], [{"type": "function", "function": {"name": "f", "strict": True}}]),
        ([json.dumps(TOOL)], [TOOL]),
        (
            [{"name": "f", "parameters": '{"type": "object"}'}],
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        ),
    ],
)
def test_tools_are_kept_whole(value: Any, tools: Any) -> None:
    assert read_tools(value) == tools


def test_tools_of_a_message_are_those_of_the_chat() -> None:
    system = {"role": "system", "content": "s", "tools": [FLAT]}
    row = messages(system, {"role": "user", "content": "u", "tools": None})
    chat = FORMATS["messages"].to_chat(row)
    assert chat.tools == read_tools([FLAT])
    assert chat.messages[0] == {"role": "system", "content": "s"}
    assert FORMATS["messages"].to_chat({**row, "tools": [FLAT]}).tools == chat.tools
    fault = fault_of({**row, "functions": [{"name": "g"}]})
    assert fault.problem == "has tools in two places, which differ"


@pytest.mark.parametrize(
    ("message", "kind", "problem"),
    [
        (
            {"tool_calls": [CALL], "function_call": CALL},
            "two_values",
            "message 1 has calls in 'tool_calls' and 'function_call'",
        ),
        (
            {"tool_calls": [{**CALL, "type": "custom"}]},
            "bad_tool_call",
            "a call of message 1 has the type 'custom', not 'function'",
        ),
        (
            {"tool_calls": [{**CALL, "output": "x"}]},
            "unknown_key",
            "a call of message 1 has 'output', which is not read: 'x'",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "bad_tool_call",
            "a call of message 1 has arguments without names: {'name': 'f', 'arguments': '[1]'}",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
            "bad_tool_call",
            "the arguments of a call in message 1 is not JSON (the key 'a' appears twice in one"
            ' object): \'{"a": 1, "a": 2}\'',
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"day": datetime.date(2026, 1, 2)}}]},
            "bad_tool_call",
            "a call of message 1: f.day is a date, which is not a JSON value; save it as text:"
            " datetime.date(2026, 1, 2)",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": [float("nan")]}}]},
            "bad_tool_call",
            "a call of message 1: f.x is nan, which is not a JSON value",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": "\ud83d"}}]},
            "not_unicode",
            "a call of message 1: f.x has half a character at place 0: surrogates not allowed",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": deep(99)}}]},
            "bad_tool_call",
            f"{'a call of message 1: f.x' + '.x' * 64} is nested more than 64 levels deep",
        ),
        (
            {"tool_calls": [{**CALL, "id": 7}]},
            "not_text",
            "the id of a call in message 1 should be text, it is int: 7",
        ),
        (
            {"role": "user", "tool_calls": [CALL]},
            "bad_tool_call",
            "message 1, the user's, has calls: [{'name': 'find', 'arguments': {'what': 'keys'}}]",
        ),
        (
            {"role": "user", "thinking": "hm"},
            "not_text",
            "message 1, the user's, has reasoning: 'hm'",
        ),
        (
            {"reasoning": "a", "thinking": "b"},
            "two_values",
            "message 1 has 'reasoning' and 'thinking', which differ: 'a', 'b'",
        ),
        (
            {"content": "<think>a</think>x", "reasoning": "b"},
            "two_values",
            "content of message 1 has reasoning in its text and other in a key",
        ),
        (
            {"content": "", "reasoning": "b"},
            "empty_turn",
            "message 1 has reasoning, and no answer after it",
        ),
        (
            {"content": "a", "value": "b"},
            "two_values",
            "message 1 has 'content' and 'value', which differ: 'a', 'b'",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]},
            "not_text",
            "content of message 1 has reasoning after its text",
        ),
        (
            {"content": [{"type": "text", "text": "a", "citations": ["b"]}]},
            "unknown_key",
            "a part of content of message 1 has 'citations', which is not read: ['b']",
        ),
        ({"name": 7}, "not_text", "name of message 1 should be text, it is int: 7"),
        (
            {"prefix": True},
            "unknown_key",
            "message 1 has 'prefix', which is not read: True",
        ),
        (
            {"content": None, "refusal": "No.", "name": "a", "weight": 1},
            "unknown_key",
            "message 1 has 'refusal', which is not read: 'No.'",
        ),
        (
            {"refusal": "No."},
            "unknown_key",
            "message 1 has 'refusal', which is not read: 'No.'",
        ),
    ],
)
def test_a_message_that_says_what_is_not_read_names_it(
    message: dict[str, Any], kind: str, problem: str
) -> None:
    fault = fault_of(messages({"role": "assistant", "content": "x", **message}))
    assert (fault.kind, fault.problem) == (kind, problem)


def test_what_says_nothing_to_a_model_is_not_used_and_named() -> None:
    row = {
        "id": 7,
        "empty": "",
        "source": "forum",
        **messages(
            {"role": "user", "content": "u", "timestamp": "now", "refusal": "", "toxic": False},
            {"role": "assistant", "content": "a", "turn": 3, "message_id": "m", "audio": None},
        ),
    }
    unused = {"id", "source", "message.timestamp", "message.turn", "message.message_id"}
    assert FORMATS["messages"].to_chat(row).unused == unused
    ignored = FORMATS["messages"].to_chat(row, frozenset({"source", "turn"})).unused
    assert ignored == unused - {"source", "message.turn"}


@pytest.mark.parametrize("name", ["images", "image", "audio", "videos"])
def test_a_row_with_pictures_or_sounds_is_refused_unless_they_are_ignored(name: str) -> None:
    for form, row in (("messages", messages(USER, GOOD)), ("text", {"text": "a <image>"})):
        fault = fault_of({**row, name: ["a.png"]}, form)
        assert (fault.kind, fault.key) == ("media", name)
        assert fault.problem == f"has {name!r}, and only text is trained: ['a.png']"
        assert FORMATS[form].to_chat({**row, name: ["a.png"]}, frozenset({name})).unused == set()
        assert FORMATS[form].to_chat({**row, name: []}).unused == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", [["a", "b"]]),
        ("documents", ["d"]),
        ("context", "c"),
        ("reasoning", "r"),
    ],
)
def test_a_column_that_a_model_should_see_is_refused_where_no_format_reads_it(
    name: str, value: Any
) -> None:
    fault = fault_of({**messages(USER, GOOD), name: value})
    assert (fault.kind, fault.key) == ("unknown_key", name)
    assert fault.problem.startswith(f"has {name!r}, which its format does not read: ")


def test_a_key_that_cannot_be_printed_is_shown_escaped() -> None:
    row = {**messages(USER, GOOD), "\ud83d": "x", "\x1b[2J": "x", "long" * 50: "x"}
    assert FORMATS["messages"].to_chat(row).unused == {
        *("'\\ud83d'", "'\\x1b[2J'", f"'{('long' * 50)[:59]}…")
    }


def test_a_column_that_says_nothing_is_no_column() -> None:
    empty = {"chat_template_kwargs": {"custom_instructions": "", "tools": []}, "documents": [None]}
    assert FORMATS["messages"].to_chat({**messages(USER, GOOD), **empty}).unused == set()


def test_variables_of_the_chat_template_are_read_without_those_that_are_empty() -> None:
    given = {"enable_thinking": False, "custom_instructions": "", "xml_tools": [], "effort": "low"}
    wanted = {"enable_thinking": False, "effort": "low"}
    for row in (
        {"chat_template_kwargs": given},
        {"chat_template_kwargs": json.dumps(given)},
        {"chat_template_kwargs": {"effort": "low"}, "enable_thinking": False},
        {"chat_template_kwargs": given, "enable_thinking": False},
    ):
        chat = FORMATS["messages"].to_chat({**messages(USER, GOOD), **row})
        assert chat.template_kwargs == wanted
    assert FORMATS["messages"].to_chat(messages(USER, GOOD)).template_kwargs is None


@pytest.mark.parametrize(
    ("row", "kind", "problem"),
    [
        ({"chat_template_kwargs": ["x"]}, "bad_template_kwargs", "is not a mapping: ['x']"),
        ({"chat_template_kwargs": "{"}, "bad_template_kwargs", "is not JSON"),
        ({"enable_thinking": "no"}, "bad_template_kwargs", "should be true or false, it is 'no'"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "two_values",
            "has 'enable_thinking' and other in 'chat_template_kwargs'",
        ),
    ],
)
def test_variables_that_are_none_are_refused(row: dict[str, Any], kind: str, problem: str) -> None:
    fault = fault_of({**messages(USER, GOOD), **row})
    assert fault.kind == kind
    assert problem in fault.problem


@pytest.mark.parametrize("name", ["tools", "functions", "tool_defs", "available_tools"])
def test_functions_are_read_under_each_of_their_names(name: str) -> None:
    """PrimeIntellect-ai/prime-rl#2494: rows with `tool_defs` were trained without functions."""
    plain = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    wanted = [{"type": "function", "function": plain}]
    for value in (wanted, [plain], json.dumps([plain])):
        assert FORMATS["messages"].to_chat({**messages(USER, GOOD), name: value}).tools == wanted


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>\n"])
@pytest.mark.parametrize("start", ["", "<|start|>assistant"])
def test_an_answer_in_the_channels_of_gpt_oss_has_its_reasoning_apart(start: str, end: str) -> None:
    """sgl-project/sglang#10061, simonw/llm-mlx#24: the template raises an error on such a text."""
    said = (
        f"{start}<|channel|>analysis<|message|>2 + 2\nis 4<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>4{end}"
    )
    wanted = "<think>\n2 + 2\nis 4\n</think>\n\n4"
    row = messages(USER, {"role": "assistant", "content": said})
    assert FORMATS["messages"].to_chat(row).messages[-1]["content"] == wanted
    pair = FORMATS["prompt-completion"].to_chat({"prompt": "2 + 2?", "completion": said})
    assert pair.messages[-1]["content"] == wanted
    other = "<|channel|>final alone"
    assert FORMATS["messages"].to_chat(
        messages(USER, {"role": "assistant", "content": other})
    ).messages[-1] == {"role": "assistant", "content": other}


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


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(key: str) -> None:
    thought = [("assistant", "<think>\n2 + 2\n</think>\n\n4")]
    assert turns(messages({"role": "assistant", "content": "4", key: "2 + 2"}), "messages") == (
        thought
    )
    assert turns({"question": "q", "answer": "4", key: "2 + 2"}, "question-answer")[1:] == thought
    assert turns({"prompt": "q", "completion": "4", key: "2 + 2"}, "prompt-completion")[1:] == (
        thought
    )


def test_reasoning_that_stands_in_the_text_too_is_not_doubled() -> None:
    content = "<think>\n2 + 2\n</think>\n4"
    row = messages({"role": "assistant", "content": content, "reasoning": "2 + 2 "})
    assert turns(row, "messages") == [("assistant", content)]


@pytest.mark.parametrize("thought", ["2 + 2", [{"type": "text", "text": "2 + 2"}]])
def test_reasoning_in_parts_is_read(thought: Any) -> None:
    parts = [
        {"type": "thinking", "thinking": thought, "signature": "x"},
        {"type": "text", "text": "4"},
    ]
    row = messages({"role": "assistant", "content": parts})
    assert turns(row, "messages") == [("assistant", "<think>\n2 + 2\n</think>\n\n4")]
    assert FORMATS["messages"].to_chat(row).unused == {"part.signature"}


def test_a_system_message_is_not_doubled_and_two_are_refused() -> None:
    row = messages({"role": "system", "content": "s"}, USER, GOOD)
    assert [role for role, _ in turns({**row, "system": "s "}, "messages")] == [
        *("system", "user", "assistant")
    ]
    fault = fault_of({**row, "system_prompt": "other"})
    assert fault.problem == "has 'system' and a system message, which differ: 'other', 's'"
    assert turns({**messages(USER, GOOD), "system_prompt": "s"}, "messages")[0] == ("system", "s")
    assert turns({"chosen": [USER, GOOD], "system": "s"}, "chosen")[0] == ("system", "s")


def test_messages_that_were_written_out_as_text_are_messages() -> None:
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([GOOD])}
    assert turns(row, "prompt-completion") == [("user", "u"), ("assistant", "good")]
    fault = fault_of({**row, "prompt": str([USER])}, "prompt-completion")
    assert fault.problem.startswith("'prompt' is not JSON (")
    plain = {"prompt": '[{"a": 1}]', "completion": "[1]"}
    assert turns(plain, "prompt-completion") == [("user", '[{"a": 1}]'), ("assistant", "[1]")]


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
    exchange = {"prompt": "And now?", "completion": "Now.", "history": '[["Hello?", "Hello."]]'}
    assert turns(exchange, "prompt-completion") == turns(row, "alpaca")


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
    fault = pickle.loads(pickle.dumps(RowFault("kind", "what is wrong", "header")))
    assert (fault.kind, fault.problem, fault.key) == ("kind", "what is wrong", "header")
    assert str(fault) == "what is wrong"


# Nothing disappears.


def said(value: Any) -> set[str]:
    """Every text in a value, keys of mappings too."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return set().union(*map(said, value)) if isinstance(value, list) else set()


def kept(chat: Chat) -> set[str]:
    return said([chat.messages, chat.tools, chat.rejected, chat.text])


@given(strategies.styles.flatmap(strategies.rows))
@settings(max_examples=150, deadline=None)
def test_every_text_of_a_row_is_in_its_chat(made: tuple[dict[str, Any], list[str]]) -> None:
    row, texts = made
    (form,) = fitting(row)
    chat = form.to_chat(row)
    found = kept(chat)
    assert [text for text in texts if not any(text in one for one in found)] == []
    assert {"id", "source", "url", "score"} & set(row) == {u for u in chat.unused if "." not in u}


@given(strategies.odd_rows())
@settings(max_examples=400, deadline=None)
def test_an_added_key_is_refused_used_or_named(made: tuple[dict[str, Any], dict[str, str]]) -> None:
    row, texts = made
    fits = fitting(row)
    if len(fits) != 1:
        return
    try:
        chat = fits[0].to_chat(row)
    except RowFault:
        return
    found, named = (
        kept(chat),
        {end for name in chat.unused for end in (name, name.split(".", 1)[-1])},
    )
    lost = [text for text in texts if not any(text in one for one in found)]
    assert [text for text in lost if texts[text] not in named] == []
