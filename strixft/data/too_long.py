"""Cut and divide rows that are longer than `max_length`, as the recipe's policy asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from strixft.data.encode import Encoder, TokenRow, TooLong
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message


def cut(row: TokenRow, max_length: int) -> TokenRow | None:
    """Return the row's start; None if nothing of it would be trained."""
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
    """Return plain text in stretches of `max_length`."""
    made = []
    for start in range(0, len(row), max_length):
        trained = row.trained[start : start + max_length].copy()
        trained[:1] = False
        if trained.any():
            ids = row.input_ids[start : start + max_length]
            made.append(TokenRow(ids, trained, max(1, len(ids) // 2), "", ""))
    return made


def stretches(encoder: Encoder, text: str) -> Iterator[TokenRow]:
    """Yield the rows of a text that is too long for the tokenizer, one stretch at a time.

    The tokens of a row of 16 MiB would take a gigabyte.
    """
    size = (encoder.most_characters or len(text)) // 2
    for start in range(0, len(text), size):
        part = text[start : start + size]
        piece = encoder.text_piece(part, begins=not start, ends=start + size >= len(text))
        (found,) = encoder.rows([[piece]])
        if isinstance(found, list):
            yield from (row for row in found if isinstance(row, TokenRow))


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the opening of a chat, and its exchanges, each from one user's turn to the next."""
    opening = [m for m in messages[:1] if m["role"] in ("system", "developer")]
    found: list[list[Message]] = []
    for message in messages[len(opening) :]:
        if message["role"] == "user" or not found:
            found.append([])
        found[-1].append(message)
    return opening, found


def halves(chat: Chat) -> tuple[Chat, Chat] | None:
    """Divide a chat between exchanges into two, which both begin with the system message.

    Returns:
        None where there is one exchange only, or a half without an answer.
    """
    opening, exchanges = _exchanges(chat.messages)
    sizes = [sum(len(m["content"]) for m in exchange) for exchange in exchanges]
    places = range(1, len(exchanges))
    middle = sum(sizes) / 2
    for place in sorted(places, key=lambda place: abs(sum(sizes[:place]) - middle)):
        parts = [
            [*opening, *(m for exchange in half for m in exchange)]
            for half in (exchanges[:place], exchanges[place:])
        ]
        if all(any(m["role"] == "assistant" for m in part) for part in parts):
            return replace(chat, messages=parts[0]), replace(chat, messages=parts[1])
    return None


def divide(encoder: Encoder, chat: Chat, max_length: int) -> list[TokenRow | TooLong]:
    """Divide a chat that is too long into several, and cut none of its answers.

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
        short = [row for row in found if isinstance(row, TokenRow)]
        rows = short or stretches(encoder, chat.text)
        return [part for row in rows for part in windows(row, max_length)]
    parts = halves(chat)
    if parts is None:
        return list(found)
    return [row for part in parts for row in divide(encoder, part, max_length)]
