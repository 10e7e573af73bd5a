"""Talk to a trained model, or to its base: answers come word by word."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from strixft.evaluate import load_side
from strixft.formats import Message
from strixft.model import load_tokenizer
from strixft.runs import Run
from strixft.train import ADAPTER, Trained

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
        adapter = run.require(Trained).folder / ADAPTER
        self.model: Any = load_side(run.recipe, adapter, "base" if base else "tuned")
        self.tokenizer = load_tokenizer(run.recipe)
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[str]:
        """The answer to the next message, piece by piece; the conversation remembers both."""
        from transformers import TextIteratorStreamer

        self.messages.append({"role": "user", "content": text})
        prompt = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
        )
        settings = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "streamer": streamer}
        worker = threading.Thread(
            target=self.model.generate,
            kwargs={
                "input_ids": prompt["input_ids"],
                "attention_mask": prompt["attention_mask"],
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.eos_token_id,
                **settings,
            },
            daemon=True,
        )
        worker.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        worker.join()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
