"""Chat: answers come in pieces, and the conversation is remembered."""

import io
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from terminal import at_a_terminal
from test_cli import ENTRY
from test_train import trained
from transformers import GenerationConfig

from strixft.app.chat import Chat, Turn, own_temperature
from strixft.app.chat_box import ChatBox, transcript
from strixft.app.cli import main
from strixft.evaluate.variants import VARIANTS, load_variant
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import FitError, StageError
from strixft.support.text import visible
from strixft.train.stage import ADAPTER


def said(talk: Chat, text: str, variant: str = "tuned") -> str:
    talk.max_tokens = min(talk.max_tokens, 24)  # a random model seldom ends by itself
    return "".join(piece for _, piece in talk.ask(text, (variant,)))


def answer_of(talk: Chat, text: str) -> str:
    """The whole answer, however long."""
    return "".join(piece for _, piece in talk.ask(text))


def test_a_conversation_is_remembered(run: Run) -> None:
    talk = Chat(run)
    first = said(talk, "Count to 3.")
    said(talk, "And to 4?")
    assert [(turn.text, list(turn.answers)) for turn in talk.turns] == [
        ("Count to 3.", ["tuned"]),
        ("And to 4?", ["tuned"]),
    ]
    assert talk.turns[0].answers["tuned"] == first


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_transformers(run: Run, variant: str) -> None:
    """Base and tuned in turns from one model in memory, against each alone and its own template."""
    talk = Chat(run)
    talk.max_tokens = 24
    list(talk.ask("Count to 3.", VARIANTS))
    list(talk.ask("And to 4?", VARIANTS))
    model: Any = load_variant(run.recipe, run.folder / "train" / ADAPTER, variant)
    tokenizer = talk.tokenizer
    messages = []
    for turn in talk.turns:
        messages.append({"role": "user", "content": turn.text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0]
        answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert turn.answers[variant] == answer
        messages.append({"role": "assistant", "content": answer})


def test_a_variant_that_was_not_asked_sees_the_others_answer(run: Run) -> None:
    talk = Chat(run)
    said(talk, "Count to 3.")
    said(talk, "And to 4?", "base")
    alone = Chat(run)
    alone.max_tokens = 24
    alone.turns.append(Turn("Count to 3.", {"base": talk.turns[0].answers["tuned"]}))
    assert said(alone, "And to 4?", "base") == talk.turns[1].answers["base"]


def test_settings_of_sampling_reach_the_model(run: Run) -> None:
    talk = Chat(run)
    assert talk.temperature == 0
    talk.max_tokens = 4
    short = said(talk, "Count to 9.")
    assert len(talk.tokenizer(short)["input_ids"]) <= 5
    talk.reset()
    talk.max_tokens, talk.temperature = 24, 2.0
    torch.manual_seed(0)
    answers = {said(talk, "Count to 9.") for _ in range(3)}
    assert len(answers) == 3
    talk.reset()
    talk.temperature, talk.system = 0.0, "Answer in French."
    prompts = talk._messages("tuned", "Hello")
    assert prompts[0] == {"role": "system", "content": "Answer in French."}


def test_the_temperature_is_the_models_own(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.recipe.model, tmp_path / "model")
    GenerationConfig(do_sample=True, temperature=0.6).save_pretrained(folder)
    sampled = run.recipe.model_copy(update={"model": str(folder)})
    assert own_temperature(sampled) == 0.6
    (folder / "generation_config.json").unlink()
    assert own_temperature(sampled) == 0.0


def test_an_answer_that_is_stopped_is_kept(run: Run) -> None:
    talk = Chat(run)
    answer = talk.ask("Count to 9.", VARIANTS)
    assert next(answer)[0] == "base"
    talk.stop()
    rest = list(answer)
    assert {variant for variant, _ in rest} <= {"base"}
    assert list(talk.turns[0].answers) == ["base"]


def test_bytes_that_are_no_text_do_not_end_a_conversation(run: Run) -> None:
    command = [sys.executable, "-c", ENTRY, "chat", str(run.folder)]
    typed = "Gr\u00fc\u00dfe\n".encode("latin-1") + b"Count to 3.\n"
    done = subprocess.run(command, input=typed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    talk = Chat(run)
    answers = [answer_of(talk, text) for text in ("Gr\ufffd\ufffde", "Count to 3.")]
    assert done.stdout.decode() == "".join(f"{visible(answer)}\n" for answer in answers)


@pytest.fixture(scope="module")
def run(write_module_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run."""
    opened = open_run(write_module_recipe(), tmp_path_factory.mktemp("runs") / "run")
    trained(opened)
    return opened


class Full(torch.nn.Module):
    """Raises after a few tokens what a full device raises."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 4:
            raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB")
        return x


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is loaded runs out of memory at its fourth token."""

    def load(*words: Any, **more: Any) -> Any:
        model: Any = load_variant(*words, **more)
        model.get_base_model().model.norm = Full()
        return model

    monkeypatch.setattr("strixft.app.chat.load_variant", load)


@pytest.mark.usefixtures("full")
def test_memory_that_ends_in_an_answer_ends_the_chat(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["strixft", "chat", str(run.folder)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count to 3.\nAnd on?\n"))
    with pytest.raises(SystemExit, match="3"):
        main()
    out, err = capfd.readouterr()
    assert out.endswith("\n")
    assert "the model cannot answer: out of memory: HIP out of memory" in err
    assert err.splitlines()[-1].startswith("fix: close other programs")


@pytest.mark.usefixtures("full")
def test_nothing_is_remembered_of_an_answer_that_fails(run: Run) -> None:
    talk = Chat(run)
    with pytest.raises(FitError):
        said(talk, "Count to 3.")
    assert talk.turns == []
    assert len(said(talk, "Count to 3.")) > 0  # the fourth token is over
    assert len(talk.turns) == 1


def test_an_answer_that_nobody_reads_on_ends(run: Run) -> None:
    talk, before = Chat(run), threading.active_count()
    answer = talk.ask("Count to 3.")
    next(answer)
    answer.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before
    assert talk.turns == []


def test_a_template_that_refuses_is_told(run: Run) -> None:
    talk = Chat(run)
    talk.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(StageError, match="cannot answer: TemplateError: roles must alternate"):
        said(talk, "Count to 3.")


# In a notebook.


def test_a_box_shows_the_message_at_once_and_answers_as_the_chat_does(run: Run) -> None:
    box = ChatBox(run)
    shown: list[str] = []
    box.said.observe(lambda change: shown.append(change["new"]), names="value")
    box.text.value, box.max_tokens.value = "Count to 3.", 24
    box.send.click()
    assert "Count to 3." in shown[0]
    box.wait()
    talk = Chat(run)
    talk.max_tokens = 24
    list(talk.ask("Count to 3.", VARIANTS))
    assert transcript(talk.turns) in box.said.value
    assert not box.send.disabled
    assert box.stop.disabled
    box.variants.value = ("base",)
    box.temperature.value = 0.5
    assert transcript(talk.turns) in box.said.value  # settings leave the conversation
    box.clear.click()
    assert "Count to 3." not in box.said.value


def test_nothing_that_is_said_is_read_as_html() -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b[31m"
    page = transcript([Turn(hostile, dict.fromkeys(VARIANTS, hostile))])
    assert "<img" not in page
    assert "\x1b" not in page
    assert page.count("&lt;img") == 3


def test_a_box_says_what_is_missing(tiny_run: Run) -> None:
    box = ChatBox(tiny_run)
    box.text.value = "Hello"
    box.send.click()
    box.wait()
    assert "stage train" in box.said.value
    assert "has not run yet" in box.said.value
    assert box.text.value == "Hello"


def test_a_box_shows_an_error_that_is_not_ours(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """unslothai/unsloth#5348: a model that ended without a word; the page waited."""

    def fail(*_: object) -> None:
        raise OSError("a disk that is gone")

    monkeypatch.setattr("strixft.app.chat_box.Chat", fail)
    box = ChatBox(tiny_run)
    box.text.value = "Hello"
    box.send.click()
    box.wait()
    assert "OSError: a disk that is gone" in box.said.value
    assert "Loading" not in box.said.value
    assert (box.text.value, box.send.disabled) == ("Hello", False)


# In a terminal.


def test_a_terminal_has_a_greeting_a_prompt_and_commands(run: Run) -> None:
    lines = ["/help", "/temprature 1", "/temperature 9", "/length 3", "/both", "Count to 3."]
    shown = at_a_terminal(["chat", str(run.folder)], [*lines, "/reset", "/quit"])
    assert "tuned answers. /help shows the commands" in shown
    assert "/temperature 0.7  0 takes the most likely token" in shown
    assert "did you mean '/temperature'?" in shown
    assert "'9' is not a number from 0 to 2" in shown
    assert "at most 3 tokens" in shown
    assert re.search(r"> Count to 3\.\r\n.*base: .*\n.*tuned: ", shown, re.DOTALL)
    assert "the conversation is forgotten" in shown
    assert "Traceback" not in shown
