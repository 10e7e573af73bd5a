"""Chat: answers come in pieces, and the conversation is remembered."""

import io
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from test_cli import ENTRY
from test_train import trained

from strixft.app.chat import Chat, ChatBox, transcript
from strixft.app.cli import main
from strixft.evaluate.variants import load_variant
from strixft.run.folder import Run
from strixft.run.open import open_run
from strixft.support.errors import FitError, StageError
from strixft.support.text import visible


def test_a_conversation_is_remembered(run: Run) -> None:
    talk = Chat(run)
    first = "".join(talk.ask("Count to 3."))
    "".join(talk.ask("And to 4?"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first
    base = Chat(run, base=True)
    assert "".join(base.ask("Count to 3.")) != first


def test_bytes_that_are_no_text_do_not_end_a_conversation(run: Run) -> None:
    command = [sys.executable, "-c", ENTRY, "chat", str(run.folder)]
    typed = "Gr\u00fc\u00dfe\n".encode("latin-1") + b"Count to 3.\n"
    done = subprocess.run(command, input=typed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    talk = Chat(run)
    answers = ["".join(talk.ask(text)) for text in ("Gr\ufffd\ufffde", "Count to 3.")]
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

    def load(*words: Any) -> Any:
        model: Any = load_variant(*words)
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
        list(talk.ask("Count to 3."))
    assert talk.messages == []
    assert len("".join(talk.ask("Count to 3."))) > 0  # the fourth token is over
    assert len(talk.messages) == 2


def test_an_answer_that_nobody_reads_on_ends(run: Run) -> None:
    talk, before = Chat(run), threading.active_count()
    answer = talk.ask("Count to 3.")
    next(answer)
    answer.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before


def test_a_template_that_refuses_is_told(run: Run) -> None:
    talk = Chat(run)
    talk.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(StageError, match="cannot answer: TemplateError: roles must alternate"):
        list(talk.ask("Count to 3."))


def test_a_box_answers_as_the_chat_does(run: Run) -> None:
    box = ChatBox(run)
    shown: list[str] = []
    box.said.observe(lambda change: shown.append(change["new"]), names="value")
    box.text.value = "Count to 3."
    box.send.click()
    talk = Chat(run)
    "".join(talk.ask("Count to 3."))
    assert box.said.value == transcript(talk.messages)
    assert len(shown) > 2  # it came in pieces
    assert not box.send.disabled
    box.variant.value = True
    assert box.said.value == ""


def test_nothing_that_is_said_is_read_as_html() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    html = transcript(
        [{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile}]
    )
    assert "<img" not in html
    assert html.count("&lt;img") == 2


def test_a_box_says_what_is_missing(tiny_run: Run) -> None:
    box = ChatBox(tiny_run)
    box.text.value = "Hello"
    box.send.click()
    assert "stage train" in box.said.value
    assert "has not run yet" in box.said.value
