"""Chat: answers come in pieces, and the conversation is remembered."""

import subprocess
import sys

from test_cli import ENTRY
from test_train import trained

from strixft.chat import Chat, ChatBox, transcript
from strixft.runs import Run
from strixft.text import visible


def test_a_conversation_is_remembered(tiny_run: Run) -> None:
    trained(tiny_run)
    talk = Chat(tiny_run)
    first = "".join(talk.ask("Count to 3."))
    "".join(talk.ask("And to 4?"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first
    base = Chat(tiny_run, base=True)
    assert "".join(base.ask("Count to 3.")) != first


def test_bytes_that_are_no_text_do_not_end_a_conversation(tiny_run: Run) -> None:
    trained(tiny_run)
    command = [sys.executable, "-c", ENTRY, "chat", str(tiny_run.folder)]
    typed = "Gr\u00fc\u00dfe\n".encode("latin-1") + b"Count to 3.\n"
    done = subprocess.run(command, input=typed, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    talk = Chat(tiny_run)
    answers = ["".join(talk.ask(text)) for text in ("Gr\ufffd\ufffde", "Count to 3.")]
    assert done.stdout.decode() == "".join(f"{visible(answer)}\n" for answer in answers)


def test_a_box_answers_as_the_chat_does(tiny_run: Run) -> None:
    trained(tiny_run)
    box = ChatBox(tiny_run)
    shown: list[str] = []
    box.said.observe(lambda change: shown.append(change["new"]), names="value")
    box.text.value = "Count to 3."
    box.send.click()
    talk = Chat(tiny_run)
    "".join(talk.ask("Count to 3."))
    assert box.said.value == transcript(talk.messages)
    assert len(shown) > 2  # it came in pieces
    assert not box.send.disabled
    box.side.value = True
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
