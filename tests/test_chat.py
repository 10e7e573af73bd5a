"""Chat: answers come in pieces, and the conversation is remembered."""

from test_train import trained

from strixft.chat import Chat
from strixft.runs import Run


def test_a_conversation_is_remembered(tiny_run: Run) -> None:
    trained(tiny_run)
    talk = Chat(tiny_run)
    first = "".join(talk.ask("Count to 3."))
    "".join(talk.ask("And to 4?"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first
    base = Chat(tiny_run, base=True)
    assert "".join(base.ask("Count to 3.")) != first
