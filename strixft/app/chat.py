"""Conversations with a trained model and its base: same questions, answers beside each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from strixft.catalog.methods import METHODS
from strixft.evaluate.variants import load_variant
from strixft.formats.messages import Message
from strixft.model.config import first_lines
from strixft.model.source import load_tokenizer, model_source
from strixft.prepare.stage import Prepared
from strixft.recipe.schema import Recipe
from strixft.run.folder import Run
from strixft.support.errors import FitError, StageError, StrixftError, is_out_of_memory
from strixft.train.stage import ADAPTER, Trained

LONGEST_ANSWER = 512
"""Most tokens of an answer, unless asked otherwise."""

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""Arguments of `generate` for the most likely token; the last three are its defaults."""


@dataclass
class Turn:
    """A message and the answers to it, by variant."""

    text: str
    answers: dict[str, str] = field(default_factory=dict)


def own_temperature(recipe: Recipe) -> float:
    """Return the temperature of a model's generation config; 0 if it does not sample."""
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(model_source(recipe.model), local_files_only=True)
    except (OSError, ValueError):  # it has none
        return 0.0
    return float(own.temperature or 1.0) if own.do_sample else 0.0


class Chat:
    """A conversation with the models of a run, which are loaded with the first question.

    Args:
        run: A trained run.

    Raises:
        StageError: The run is not trained yet.
    """

    def __init__(self, run: Run) -> None:
        trained = run.require(Trained)
        trained.require_same_base(run.recipe)
        self._recipe, self._adapter = run.recipe, trained.folder / ADAPTER
        self.tokenizer = load_tokenizer(run.recipe)
        self.ends = run.require(Prepared).ends(self.tokenizer)
        self._models: dict[str, Any] = {}
        self._stop = threading.Event()
        self.turns: list[Turn] = []
        self.temperature = own_temperature(run.recipe)
        """Other settings of sampling are the model's own; at 0 it takes the most likely token."""
        self.max_tokens = LONGEST_ANSWER
        self.system = ""

    def ask(self, text: str, variants: Sequence[str] = ("tuned",)) -> Iterator[tuple[str, str]]:
        """Yield the answers to the next message piece by piece, each with its variant.

        The conversation remembers them. If one fails, or nobody reads on, the whole turn is
        forgotten.

        Raises:
            FitError: The memory is full.
            StageError: The template or the model fails.
        """
        self._stop.clear()
        turn = Turn(text)
        for variant in variants:
            turn.answers[variant] = ""
            for piece in self._answer(variant, self._messages(variant, text)):
                turn.answers[variant] += piece
                yield variant, piece
            if self._stop.is_set():
                break
        self.turns.append(turn)

    def stop(self) -> None:
        """End the answer that is being written; what there is of it is remembered."""
        self._stop.set()

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def _messages(self, variant: str, text: str) -> list[Message]:
        """Return the conversation as a variant sees it: its own answers where it was asked."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            answer = turn.answers.get(variant, next(iter(turn.answers.values())))
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": text}]

    @contextlib.contextmanager
    def _model(self, variant: str) -> Iterator[Any]:
        """Yield a variant's model, loaded if it is not; an adapter's base is the model without."""
        has_adapter = METHODS[self._recipe.method].adapter != "none"
        name = "tuned" if has_adapter else variant
        if name not in self._models:
            with _translated_errors("the model cannot be loaded"):
                self._models[name] = load_variant(self._recipe, self._adapter, name, merged=False)
        model = self._models[name]
        alone = has_adapter and variant == "base"
        with model.disable_adapter() if alone else contextlib.nullcontext():
            yield model

    def _answer(self, variant: str, messages: Sequence[Message]) -> Iterator[str]:
        with self._model(variant) as model, _translated_errors("the model cannot answer"):
            yield from self._generate(model, messages)

    def _sampling(self) -> dict[str, Any]:
        hot = {"do_sample": True, "temperature": self.temperature}
        return hot if self.temperature > 0 else GREEDY

    def _generate(self, model: Any, messages: Sequence[Message]) -> Iterator[str]:
        """Yield pieces from a thread that generates; raise here what it raises."""
        from transformers import TextIteratorStreamer

        prompt = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **self._recipe.dataset.chat_template_kwargs,
        ).to(model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[Exception] = []
        given_up = threading.Event()

        def work() -> None:
            try:
                model.generate(
                    input_ids=prompt["input_ids"],
                    attention_mask=prompt["attention_mask"],
                    **self.ends.settings(self.tokenizer),
                    **self._sampling(),
                    max_new_tokens=self.max_tokens,
                    streamer=streamer,
                    stopping_criteria=[
                        lambda ids, scores, **more: given_up.is_set() or self._stop.is_set()
                    ],
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
