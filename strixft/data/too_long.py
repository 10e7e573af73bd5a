"""Cut, divide or leave out rows that are too long, by the recipe's policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from strixft.data.encode import Encoded, Encoder, TokenRow, TooLong
from strixft.formats.faults import RowFault
from strixft.formats.messages import Chat, Message


def cut(row: TokenRow, max_length: int) -> TokenRow | None:
    """Return the row's start; None if nothing of it would be trained."""
    trained = row.trained[:max_length]
    if not trained.any():
        return None
    ids, prompt = row.input_ids[:max_length], min(row.prompt_tokens, max_length - 1)
    return replace(row, input_ids=ids, trained=trained, prompt_tokens=prompt)


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
        (found,) = encoder.tokenise([[piece]])
        if isinstance(found, list):
            yield from (row for row in found if isinstance(row, TokenRow))


def halves(chat: Chat) -> tuple[Chat, Chat] | None:
    """Divide a chat between exchanges into two, which both begin with the system message.

    Returns:
        None where there is one exchange only, or a half without an answer.
    """
    opening = [m for m in chat.messages[:1] if m["role"] in ("system", "developer")]
    exchanges: list[list[Message]] = []  # each from one user's turn to the next
    for message in chat.messages[len(opening) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    sizes = [sum(len(m["content"]) for m in exchange) for exchange in exchanges]
    places = range(1, len(exchanges))
    for place in sorted(places, key=lambda place: abs(sum(sizes[:place]) - sum(sizes) / 2)):
        first, second = (
            [*opening, *(m for exchange in half for m in exchange)]
            for half in (exchanges[:place], exchanges[place:])
        )
        if all(any(m["role"] == "assistant" for m in part) for part in (first, second)):
            return replace(chat, messages=first), replace(chat, messages=second)
    return None


def divide(encoder: Encoder, chat: Chat, max_length: int) -> Encoded:
    """Divide a chat that is too long into several, and cut none of its answers.

    Exchanges that are too long even alone come back as they are.

    Raises:
        RowFault: The template refuses a part.
    """
    (found,) = encoder.encode([chat])
    if isinstance(found, RowFault):
        raise found
    if all(isinstance(row, TokenRow) and len(row) <= max_length for row in found):
        return found
    if chat.text is not None:
        short = [row for row in found if isinstance(row, TokenRow)]
        rows = short or stretches(encoder, chat.text)
        return [part for row in rows for part in windows(row, max_length)]
    parts = halves(chat)
    if parts is None:
        return found
    return [row for part in parts for row in divide(encoder, part, max_length)]


def shorten(
    encoder: Encoder,
    chat: Chat,
    found: Encoded,
    policy: str,
    note: Callable[[str, str, str], None],
) -> Encoded:
    """Return the rows of a chat, none above the encoder's `max_length`, by the recipe's policy.

    `note` gets kind, text and action of each change.

    Raises:
        RowFault: The template refuses a part.
    """
    most = encoder.max_length
    if most is None or all(isinstance(one, TokenRow) and len(one) <= most for one in found):
        return found
    if policy == "split" and chat.rejected is None:
        parts = divide(encoder, chat, most)
        if len(parts) > len(found):
            note("split", f"has more than {most} tokens, now {len(parts)} rows", "split")
        found = parts
    made: Encoded = []
    for one in found:
        if policy == "truncate" and isinstance(one, TooLong) and chat.text is not None:
            one = next(stretches(encoder, chat.text), one)
        if isinstance(one, TokenRow) and len(one) > most:
            start = cut(one, most) if policy == "truncate" else None
            if start is not None:
                note("cut", f"has {len(one)} tokens, cut to {most}", "cut")
            one = TooLong(len(one), most) if start is None else start
        made.append(one)
    return made
