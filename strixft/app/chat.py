"""Conversations with a trained model or its base, word by word, in a terminal or a notebook."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from strixft.evaluate.variants import load_variant
from strixft.formats.messages import Message
from strixft.model.config import first_lines
from strixft.model.source import load_tokenizer
from strixft.prepare.stage import Prepared
from strixft.run.folder import Run
from strixft.support import html
from strixft.support.errors import FitError, StageError, StrixftError, is_out_of_memory
from strixft.support.text import visible
from strixft.train.stage import ADAPTER, Trained

LONGEST_ANSWER = 512
"""Most tokens of an answer."""


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
        with _translated_errors("the model cannot be loaded"):
            self.model: Any = load_variant(run.recipe, adapter, "base" if base else "tuned")
        self.tokenizer = load_tokenizer(run.recipe)
        self.template_kwargs = run.recipe.dataset.chat_template_kwargs
        self.ends = run.require(Prepared).ends(self.tokenizer)
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer to the next message piece by piece; the conversation remembers both.

        An answer that is not finished is forgotten together with its question.

        Raises:
            FitError: The memory is full.
            StageError: The template or the model fails.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        with _translated_errors("the model cannot answer"):
            for piece in self._generate(asked):
                pieces.append(piece)
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _generate(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield pieces from a thread that generates; raise here what it raises."""
        from transformers import TextIteratorStreamer

        prompt = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **self.template_kwargs,
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
                streamer.text_queue.put(streamer.stop_signal)  # `generate` sends none if it fails

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from self.ends.stream(streamer)
        finally:
            given_up.set()  # after Ctrl-C the thread ends with its token
            worker.join()
        if failures:
            raise failures[0]


@contextlib.contextmanager
def _translated_errors(what: str) -> Iterator[None]:
    """Turn any error of a template, of torch or of a model's own code into one with a fix."""
    try:
        yield
    except StrixftError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise FitError(
                f"{what}: out of memory: {first_lines(error)}",
                fix="close other programs, or start a new conversation",
            ) from error
        raise StageError(
            f"{what}: {type(error).__name__}: {first_lines(error)}",
            fix="start a new conversation; strixft chat with --debug shows where it failed",
        ) from error


def transcript(messages: Sequence[Message]) -> str:
    """Format a conversation as HTML, with all texts escaped.

    >>> transcript([{"role": "user", "content": "<b>"}])
    '<p style="white-space: pre-wrap"><b>user</b> &lt;b&gt;</p>'
    """
    return "".join(
        f'<p style="white-space: pre-wrap"><b>{escape(message["role"])}</b>'
        f" {escape(visible(message['content']))}</p>"
        for message in messages
    )


class ChatBox:
    """A conversation in a notebook. The model is loaded with the first message."""

    def __init__(self, run: Run) -> None:
        import ipywidgets

        self._run = run
        self._talk: Chat | None = None
        variants = [("tuned", False), ("base", True)]
        self.variant = ipywidgets.ToggleButtons(options=variants, description="talk to")
        self.said = ipywidgets.HTML()
        self.text = ipywidgets.Textarea(placeholder="a message")
        self.send = ipywidgets.Button(description="Send", button_style="primary")
        self.variant.observe(self._start_again, names="value")
        self.send.on_click(self._answer)
        self.box = ipywidgets.VBox([self.variant, self.said, self.text, self.send])

    def _start_again(self, _: Any) -> None:
        self._talk = None  # one model in memory at a time
        self.said.value = ""

    def _answer(self, _: Any) -> None:
        text, self.text.value = self.text.value.strip(), ""
        if not text:
            return
        self.send.disabled = True
        try:
            self._talk = self._talk or Chat(self._run, base=self.variant.value)
            answer = ""
            for piece in self._talk.ask(text):
                answer += piece
                turn: list[Message] = [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]
                self.said.value = transcript([*self._talk.messages, *turn])
            self.said.value = transcript(self._talk.messages)
        except StrixftError as error:  # an error in a click handler is not shown
            self.said.value = html.warning(f"{error.problem}; {error.fix}")
        finally:
            self.send.disabled = False


def chat_box(run: Run) -> Any:
    """Return `strixft chat` of a trained run as widgets for a notebook."""
    return ChatBox(run).box
