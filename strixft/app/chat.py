"""Talk to a trained model, or to its base, in a terminal or a notebook: word by word."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from strixft.evaluate.variants import load_variant
from strixft.formats.messages import Message
from strixft.model.config import first_lines
from strixft.model.load import load_tokenizer
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.support import html
from strixft.support.errors import FitError, StageError, StrixftError, is_out_of_memory
from strixft.support.text import visible
from strixft.train.stage import ADAPTER, Trained

LONGEST_ANSWER = 512
"""Tokens."""


class Chat:
    """A conversation with the model of a run.

    Args:
        run: A trained run.
        base: Talk to the base instead.

    Raises:
        StageError: The run is not trained yet.
    """

    def __init__(self, run: Run, *, base: bool = False) -> None:
        trained = run.require(Trained)
        trained.require_same_base(run.recipe)
        adapter = trained.folder / ADAPTER
        with _failure_told("the model cannot be loaded"):
            self.model: Any = load_variant(run.recipe, adapter, "base" if base else "tuned")
        self.tokenizer = load_tokenizer(run.recipe)
        self.ends = run.require(Prepared).ends(self.tokenizer)
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[str]:
        """The answer to the next message, piece by piece; the conversation remembers both.

        Nothing is remembered of an answer that does not come to its end.

        Raises:
            FitError: There is no memory left for it.
            StageError: The template or the model fails.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        with _failure_told("the model cannot answer"):
            for piece in self._generate(asked):
                pieces.append(piece)
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _generate(self, messages: Sequence[Message]) -> Iterator[str]:
        """Pieces from a thread that generates; what it raises is raised here."""
        from transformers import TextIteratorStreamer

        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[Exception] = []
        given_up = threading.Event()

        def work() -> None:
            try:
                self.model.generate(
                    input_ids=prompt["input_ids"],
                    attention_mask=prompt["attention_mask"],
                    **self.ends.settings(self.tokenizer),
                    max_new_tokens=LONGEST_ANSWER,
                    do_sample=False,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **more: given_up.is_set()],
                )
            except Exception as error:
                failures.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)  # generate puts none if it fails

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from self.ends.stream(streamer)
        finally:
            given_up.set()  # Ctrl-C: the thread ends with its token
            worker.join()
        if failures:
            raise failures[0]


@contextlib.contextmanager
def _failure_told(what: str) -> Iterator[None]:
    """Whatever a template, torch or a model's own code raises, as an error of ours."""
    try:
        yield
    except StrixftError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise FitError(
                f"{what}, no memory is left: {first_lines(error)}",
                fix="close other programs; a new conversation begins with less, too",
            ) from error
        raise StageError(
            f"{what}: {type(error).__name__}: {first_lines(error)}",
            fix="begin a new conversation; strixft chat with --debug shows where it failed",
        ) from error


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as HTML; whatever was written in it is text.

    >>> transcript([{"role": "user", "content": "<b>"}])
    '<p style="white-space: pre-wrap"><b>user</b> &lt;b&gt;</p>'
    """
    return "".join(
        f'<p style="white-space: pre-wrap"><b>{escape(message["role"])}</b>'
        f" {escape(visible(message['content']))}</p>"
        for message in messages
    )


class ChatBox:
    """A conversation in a notebook; no model is loaded before the first message.

    Args:
        run: A trained run.
    """

    def __init__(self, run: Run) -> None:
        import ipywidgets

        self._run = run
        self._talk: Chat | None = None
        sides = [("tuned", False), ("base", True)]
        self.side = ipywidgets.ToggleButtons(options=sides, description="talk to")
        self.said = ipywidgets.HTML()
        self.text = ipywidgets.Textarea(placeholder="a message")
        self.send = ipywidgets.Button(description="Send", button_style="primary")
        self.side.observe(self._begin_again, names="value")
        self.send.on_click(self._answer)
        self.box = ipywidgets.VBox([self.side, self.said, self.text, self.send])

    def _begin_again(self, _: Any) -> None:
        self._talk = None  # one model in memory at a time
        self.said.value = ""

    def _answer(self, _: Any) -> None:
        text, self.text.value = self.text.value.strip(), ""
        if not text:
            return
        self.send.disabled = True
        try:
            self._talk = self._talk or Chat(self._run, base=self.side.value)
            answer = ""
            for piece in self._talk.ask(text):
                answer += piece
                turn: list[Message] = [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]
                self.said.value = transcript([*self._talk.messages, *turn])
            self.said.value = transcript(self._talk.messages)
        except StrixftError as error:  # what a widget's click raises is shown nowhere
            self.said.value = html.warning(f"{error.problem}; {error.fix}")
        finally:
            self.send.disabled = False


def chat_box(run: Run) -> Any:
    """What `strixft chat` does, as widgets for a notebook.

    Args:
        run: A trained run.
    """
    return ChatBox(run).box
