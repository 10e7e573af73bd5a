"""Where an answer ends: found once, and the same wherever answers are written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data_mask import TEMPLATES, chat, encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from strixft.data.encode import Encoder, TokenRow
from strixft.data.end_tokens import Ends, eos_of_files, find_ends
from strixft.evaluate.generate import generate
from strixft.export.parity import END, compare, greedy_answers
from strixft.export.server_files import write_generation_config
from strixft.formats.messages import Chat
from strixft.servers import gguf
from strixft.servers.llama_cpp import served
from strixft.support.errors import DataError

CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}"
LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"

Make = Callable[..., Any]


def template(body: str, opens: str = "<|im_start|>assistant\n") -> str:
    """A chat template of one loop."""
    return LOOP.replace("BODY", body).replace("OPEN", opens)


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """Makes a tokenizer whose end is `<|endoftext|>`, with files of a model beside it."""

    def made(written: Any, generation: Any = None, config: Any = None, **more: Any) -> Any:
        one = AutoTokenizer.from_pretrained(tiny_model)
        one.add_special_tokens({"eos_token": "<|endoftext|>", **more})
        one.chat_template = written
        one.save_pretrained(tmp_path / "model")
        for name, ids in (("generation_config", generation), ("config", config)):
            if ids is not None:
                path = tmp_path / "model" / f"{name}.json"
                path.write_text(json.dumps({"eos_token_id": ids, "model_type": "llama"}))
        return AutoTokenizer.from_pretrained(tmp_path / "model")

    return made


def ends_of(tokenizer: Any) -> Ends:
    return find_ends(tokenizer, eos_of_files(tokenizer, offline=True))


def test_the_end_of_a_turn_stands_before_the_end_of_text(make: Make) -> None:
    assert ends_of(make(template(CHATML + "<|im_end|>\n"))) == Ends(
        (2, 0), ("<|im_end|>", "<|endoftext|>")
    )


def test_what_stands_before_an_end_token_does_not_hide_it(make: Make) -> None:
    assert ends_of(make(template(CHATML + "</answer><|im_end|>\n"))).token_ids == (2, 0)


def test_the_first_of_two_end_tokens_ends_an_answer(make: Make) -> None:
    """Phi-3 writes `<|end|>` after each answer, and then the end of the text."""
    written = "{% for m in messages %}" + CHATML + "<jupyter_text>\n{% endfor %}"
    asked = (
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    assert ends_of(make(written + asked)).texts == ("<jupyter_text>", "<|endoftext|>")


def test_words_that_are_no_token_end_an_answer_as_text(make: Make) -> None:
    found = ends_of(make(template("### {{ m.role }}: {{ m.content }} [END]\n", "### assistant:")))
    assert found == Ends((0,), ("<|endoftext|>", " [END]"))
    assert found.strings == [" [END]"]


def test_all_ends_of_the_generation_settings_count(make: Make) -> None:
    found = ends_of(make(template(CHATML + "<|im_end|>\n"), generation=[0, 4, 2], config=5))
    assert found.token_ids == (2, 0, 4, 5)


def test_a_number_that_was_never_meant_for_this_tokenizer_ends_nothing(make: Make) -> None:
    """A `config.json` has its class's default where nobody thought of it."""
    made = make(template(CHATML + "<|im_end|>\n"), generation=10**7, config=[1000, 10**7])
    assert ends_of(made).token_ids == (2, 0)


def test_each_of_several_templates_has_its_end(make: Make) -> None:
    named = {
        "default": template(CHATML + "<|im_end|>\n"),
        "tool_use": template("{{ tools }}" + CHATML + "<jupyter_text>\n"),
    }
    found = ends_of(make(named))
    assert found.texts == ("<|im_end|>", "<jupyter_text>", "<|endoftext|>")


def test_a_template_that_opens_an_answer_unasked_ends_it_where_it_ends(make: Make) -> None:
    """It does not heed `add_generation_prompt`, which transformers leaves to it."""
    one = make(
        "{% for m in messages %}" + CHATML + "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    assert ends_of(one).token_ids[0] == 2
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [*chat("Hi", "Hello."), *chat("Bye", "So long.")]
    messages[3]["tool_calls"] = [call]
    for texts in (chat("Hi", "Hello."), messages):
        (row,) = encode(one, texts)
        assert one.decode(row.input_ids[row.trained].tolist()).endswith("<|im_end|>")


def test_a_model_that_would_not_learn_to_stop_is_refused(make: Make) -> None:
    one = make((TEMPLATES / "plain.jinja").read_text())
    one.eos_token = None
    with pytest.raises(DataError, match="would not learn to stop") as caught:
        Encoder(one).masker()
    assert "eos_token" in caught.value.fix


def test_all_of_a_chat_is_trained_with_its_end(make: Make) -> None:
    one = make((TEMPLATES / "plain.jinja").read_text())
    (row,) = encode(one, chat("Hi", "Hello."), "all")
    assert one.decode(row.input_ids.tolist()).endswith("Hello.<|endoftext|>")
    assert row.trained[1:].all()


@pytest.mark.parametrize("text", ["Only words.", "<s>Only words.<|endoftext|>\n"])
def test_text_that_somebody_rendered_begins_and_ends_once(make: Make, text: str) -> None:
    from tokenizers.processors import TemplateProcessing

    one = make(None, bos_token="<s>")
    one.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", one.bos_token_id)]
    )
    (found,) = Encoder(one).encode([Chat([], text=text)])
    assert isinstance(found, list)
    (row,) = found
    assert isinstance(row, TokenRow)
    assert one.decode(row.input_ids.tolist()).rstrip() == "<s>Only words.<|endoftext|>"


@given(st.lists(st.text("ab#E[] ", max_size=4), max_size=8))
def test_an_answer_that_comes_in_pieces_ends_where_the_whole_does(pieces: list[str]) -> None:
    ends = Ends((1,), ("[E]", "# a", "aab"))
    whole = "".join(pieces)
    first = min((p for text in ends.texts if (p := whole.find(text)) >= 0), default=len(whole))
    found = "".join(ends.stream(pieces))
    assert found == whole[:first] or whole.startswith(found)  # one that ends within another
    assert not any(text in found for text in ends.texts)


def says_in_turn(folder: Path, tokenizer: Any, said: str, end: str) -> Any:
    """A model whose next token follows from the last one, in a circle."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    order = tokenizer(said + end, add_special_tokens=False)["input_ids"]
    assert len(set(order)) == len(order)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        places = torch.nn.functional.normalize(torch.randn_like(model.model.embed_tokens.weight))
        model.model.embed_tokens.weight.copy_(places)
        head = torch.zeros_like(places)
        for now, following in zip(order, [*order[1:], order[0]], strict=True):
            head[following] += places[now]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
    return model.eval(), order


@pytest.mark.parametrize("end", ["<jupyter_text>", " [END] of"])
def test_answers_stop_where_generate_stops(make: Make, tiny_model: Path, end: str) -> None:
    """At a token that only the template names, and at one that is none."""
    tokenizer = make(template("### {{ m.role }}: {{ m.content }}" + end + "\n", "### assistant:"))
    ends = ends_of(tokenizer)
    model, order = says_in_turn(tiny_model, tokenizer, " one two three", end)
    asked = {"input_ids": torch.tensor([order[:1]]), "max_new_tokens": 20, "do_sample": False}
    more = {"stop_strings": ends.strings, "tokenizer": tokenizer} if ends.strings else {}
    wanted = model.generate(**asked, eos_token_id=list(ends.token_ids), **more)[0, 1:].tolist()
    assert wanted == order[1:]
    prompts = [order[:1], order[:2]]
    assert generate(model, tokenizer, ends, prompts, 20) == [wanted, wanted[1:]]
    assert ends.text(tokenizer, wanted) == " two three"
    marked = greedy_answers(model, tokenizer, ends, prompts[:1])[0]
    assert marked == (wanted if ends.strings else [*wanted[:-1], END])


def test_llama_cpp_stops_at_an_end_whose_name_it_does_not_know(
    make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """The converter tells it the tokenizer's EOS alone."""
    tokenizer = make(template(CHATML + "<jupyter_text>\n"), generation=[0, 9])
    ends = ends_of(tokenizer)
    model, order = says_in_turn(tiny_model, tokenizer, " one two three", "<jupyter_text>")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    gguf.convert_model(tmp_path / "model", tmp_path / "x.gguf", "f16", ends.token_ids)
    with served(tmp_path / "x.gguf", 64) as url:
        assert compare(url, order[:1], [*order[1:-1], END]) == (len(order) - 1, len(order) - 1)


def test_a_merged_model_stops_by_its_own_settings(tiny_model: Path, tmp_path: Path) -> None:
    ends = Ends((9, 0), ("<jupyter_text>", "<|endoftext|>"))
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5, "eos_token_id": 0}')
    write_generation_config(tmp_path, ends)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"top_p": 0.5, "eos_token_id": [9, 0]}


def test_a_run_of_an_older_version_finds_its_ends(make: Make) -> None:
    from strixft.prepare.stage import Prepared

    one = make(template(CHATML + "<|im_end|>\n"))
    figures = {"end_token": "<|im_end|>"}
    older = Prepared.__new__(Prepared)
    object.__setattr__(older, "figures", figures)
    assert older.ends(one) == Ends((2, 0), ("<|im_end|>", "<|endoftext|>"))
    object.__setattr__(older, "figures", {"answer_ends": asdict(Ends((7,), ("x",)))})
    assert older.ends(copy.copy(one)) == Ends((7,), ("x",))
