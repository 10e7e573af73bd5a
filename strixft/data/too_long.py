"""Rows that are longer than `max_length`: what the recipe's policy makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from strixft.data.encode import Encoder, TokenRow, TooLong
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message

LONG, CUT, SPLIT = "too_long", "cut", "split"


def cut(row: TokenRow, max_length: int) -> TokenRow | None:
    """The row's start; None if nothing of it would be trained."""
    trained = row.trained[:max_length]
    if not trained.any():
        return None
    return replace(
        row,
        input_ids=row.input_ids[:max_length],
        trained=trained,
        prompt_tokens=min(row.prompt_tokens, max_length - 1),
    )


def windows(row: TokenRow, max_length: int) -> list[TokenRow]:
    """Plain text in stretches of `max_length`."""
    made = []
    for start in range(0, len(row), max_length):
        trained = row.trained[start : start + max_length].copy()
        trained[:1] = False
        if trained.any():
            ids = row.input_ids[start : start + max_length]
            made.append(TokenRow(ids, trained, max(1, len(ids) // 2), "", ""))
    return made


def _stretches(encoder: Encoder, text: str) -> list[TokenRow]:
    """A text that is too long for the tokenizer in stretches, of which each is a row."""
    size = (encoder.most_characters or len(text)) // 2
    rows = []
    # one at a time: the tokens of a row of 16 MiB would take a gigabyte
    for start in range(0, len(text), size):
        part = text[start : start + size]
        piece = encoder.text_piece(part, begins=not start, ends=start + size >= len(text))
        (found,) = encoder.rows([[piece]], encoder.tokenize([[piece]]))
        rows += (
            [row for row in found if isinstance(row, TokenRow)] if isinstance(found, list) else []
        )
    return rows


def start_of_text(encoder: Encoder, text: str) -> TokenRow | None:
    """The first of the stretches of a text; None if there is none."""
    size = (encoder.most_characters or len(text)) // 2
    return next(iter(_stretches(encoder, text[: size + 1])), None)


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What opens the chat, and its exchanges, each from one turn of the user to the next."""
    opening = [m for m in messages[:1] if m["role"] in ("system", "developer")]
    found: list[list[Message]] = []
    for message in messages[len(opening) :]:
        if message["role"] == "user" or not found:
            found.append([])
        found[-1].append(message)
    return opening, found


def halves(chat: Chat) -> tuple[Chat, Chat] | None:
    """A chat as two, divided between exchanges; both begin with the system message.

    None where there is one exchange only, or a half without an answer.
    """
    opening, exchanges = _exchanges(chat.messages)
    sizes = [sum(len(m["content"]) for m in exchange) for exchange in exchanges]
    places = range(1, len(exchanges))
    middle = sum(sizes) / 2
    for place in sorted(places, key=lambda place: abs(sum(sizes[:place]) - middle)):
        parts = [
            [*opening, *(m for exchange in side for m in exchange)]
            for side in (exchanges[:place], exchanges[place:])
        ]
        if all(any(m["role"] == "assistant" for m in part) for part in parts):
            return replace(chat, messages=parts[0]), replace(chat, messages=parts[1])
    return None


def divide(encoder: Encoder, chat: Chat, max_length: int) -> list[TokenRow | TooLong]:
    """A chat that is too long as several, no answer of which is cut.

    Exchanges that are too long even alone come back as they are.

    Raises:
        RowFault: The template refuses a part.
    """
    (found,) = encoder.encode([chat])
    if isinstance(found, RowFault):
        raise found
    if all(isinstance(row, TokenRow) and len(row) <= max_length for row in found):
        return list(found)
    if chat.text is not None:
        rows = [row for row in found if isinstance(row, TokenRow)] or _stretches(encoder, chat.text)
        return [part for row in rows for part in windows(row, max_length)]
    parts = halves(chat)
    if parts is None:
        return list(found)
    return [row for part in parts for row in divide(encoder, part, max_length)]
