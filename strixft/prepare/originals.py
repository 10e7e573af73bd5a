"""Which training rows a server gets to see, and what a new row must not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strixft.data import checks
from strixft.data.checks import texts_of
from strixft.data.duplicates import SIMILAR, Split, content_hash, question_hash, similarity, sketch
from strixft.data.load import Input, read_row, value_at
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message
from strixft.prepare.build import QUESTION
from strixft.prepare.tasks import last_exchange
from strixft.recipe.schema import Recipe

Counts = Mapping[str, npt.NDArray[Any]]

Place = tuple[int, int]
"""Index of the input, and number of the row there."""


@dataclass(frozen=True, slots=True)
class Original:
    """A training row."""

    file: str
    row: int
    chat: Chat
    group: Mapping[str, Any]
    """The column that decides its side of the split, which its new rows share."""


@dataclass(slots=True)
class Known:
    """What the data say already."""

    contents: set[int]
    questions: set[int]
    held_out: set[int]
    """Questions of held-out rows."""
    sketches: bytes = b""
    """Of the held-out rows."""

    @classmethod
    def of(cls, counts: Counts, split: Split) -> Known:
        """Known of the rows on disk, without the sketches."""
        return cls(
            set(counts["content"].tolist()),
            set(counts["question"].tolist()),
            set(counts["question"][split.validation].tolist()),
        )

    def refuse(self, chat: Chat, *, is_new_question: bool) -> None:
        """Refuse what a held-out row or any other row says.

        Raises:
            RowFault: It does.
        """
        content, question = content_hash(chat), question_hash(chat)
        if question in self.held_out:
            raise RowFault("held_out", "asks what a held-out row asks")
        if content in self.contents or (is_new_question and question in self.questions):
            raise RowFault("duplicate", "says or asks what another row does")
        if similarity(sketch(" ".join(texts_of(chat))), self.sketches) >= SIMILAR:
            raise RowFault("near_held_out", "says nearly what a held-out row says")
        self.contents.add(content)
        self.questions.add(question)


def _places(counts: Counts, rows: npt.NDArray[np.int64]) -> set[Place]:
    return set(zip(counts["file"][rows].tolist(), counts["row"][rows].tolist(), strict=True))


def _chosen(places: set[Place], most: int, seed: int) -> set[Place]:
    """At most so many of the places, by the seed."""
    order = sorted(places)
    if len(order) <= most:
        return places
    picked = np.random.default_rng(seed).choice(len(order), most, replace=False)
    return {order[index] for index in picked}


def read_originals(
    recipe: Recipe, inputs: Sequence[Input], counts: Counts, split: Split
) -> tuple[list[Original], bytes]:
    """Training rows to send, and sketches of the held-out ones.

    Args:
        recipe: With `dataset.augment`.
        inputs: Where the rows come from.
        counts: Columns of numbers of the prepared rows.
        split: Which of them are trained, and which held out.
    """
    assert recipe.dataset.augment is not None
    held_out = _places(counts, split.validation)
    train = _places(counts, np.unique(split.train)) - held_out
    chosen = _chosen(train, recipe.dataset.augment.max_rows, recipe.train.seed)
    column, masks = recipe.dataset.group_by, recipe.dataset.personal_data == "mask"
    originals, sketches = [], bytearray()
    for file, one in enumerate(inputs):
        for number, raw, _ in one.raw_rows():
            if (file, number) not in held_out and (file, number) not in chosen:
                continue
            assert not isinstance(raw, RowFault)  # it became a token row
            chat = read_row(one, raw)
            chat = checks.mask_chat(chat) if masks else chat
            if (file, number) in held_out:
                sketches += sketch(" ".join(texts_of(chat)))
                continue
            group = {column: value_at(raw, column)} if column not in (None, QUESTION) else {}
            originals.append(Original(one.name, number, chat, group))
    return originals, bytes(sketches)


def require_sendable(original: Original, *, leaves: bool) -> list[Message]:
    """The messages of a row that may be sent.

    Raises:
        RowFault: It is not for this, or should not leave the machine.
    """
    messages = last_exchange(original.chat)
    if messages is None:
        raise RowFault("no_exchange", "uses tools, or does not end with a request and an answer")
    if leaves and any(checks.find(message["content"]) for message in messages):
        raise RowFault("personal", "has personal data, and the server is another machine")
    return messages
