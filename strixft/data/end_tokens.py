"""Find the ends of answers: once, at prepare, and used wherever answers are written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strixft.data.template import ChatTemplate
from strixft.support.errors import DataError


@dataclass(frozen=True, slots=True)
class Ends:
    """Tokens and texts at which an answer is over."""

    token_ids: tuple[int, ...]
    """Tokens that end an answer; the one that is trained comes first."""
    texts: tuple[str, ...]
    """The tokens' texts in the same order, then ends that are several tokens."""

    @property
    def strings(self) -> list[str]:
        """Ends that are several tokens, as `generate` takes `stop_strings`."""
        return list(self.texts[len(self.token_ids) :])

    def settings(self, tokenizer: Any) -> dict[str, Any]:
        """Return the arguments with which `generate` stops here."""
        pad = tokenizer.pad_token_id
        return {
            "eos_token_id": list(self.token_ids) or None,
            "pad_token_id": next(iter(self.token_ids), 0) if pad is None else pad,
            "stop_strings": self.strings or None,
            "tokenizer": tokenizer,
        }

    def cut(self, tokens: Sequence[int]) -> list[int]:
        """Return an answer's tokens up to and with the first end token."""
        first = next((i for i, token in enumerate(tokens) if token in self.token_ids), len(tokens))
        return list(tokens[: first + 1])

    def text(self, tokenizer: Any, tokens: Sequence[int]) -> str:
        """Return an answer as people read it, without its end."""
        said = [token for token in self.cut(tokens) if token not in self.token_ids]
        text: str = tokenizer.decode(said, skip_special_tokens=True)
        return "".join(self.stream([text]))

    def stream(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass on the pieces of an answer up to its end, which may come in several of them."""
        held = ""
        for piece in pieces:
            held += piece
            found = [place for text in self.texts if (place := held.find(text)) >= 0]
            if found:
                yield held[: min(found)]
                return
            kept = max((_opens(held, text) for text in self.texts), default=0)
            yield held[: len(held) - kept]
            held = held[len(held) - kept :]
        yield held


def _opens(text: str, end: str) -> int:
    """Return the number of characters at the end of a text with which another may begin."""
    sizes = range(min(len(text), len(end) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(end[:size])), 0)


def find_ends(tokenizer: Any, eos: Iterable[int] = (), *, chats: bool = True) -> Ends:
    """Find all ends of a model's answers.

    Args:
        tokenizer: The model's.
        eos: EOS tokens of its files (`eos_of_files`).
        chats: Count what its chat templates write after the last answer.
    """
    written = []
    if chats and tokenizer.chat_template:
        written.append(ChatTemplate(tokenizer).end_token)
        if isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template:
            with contextlib.suppress(DataError):  # rows with tools are refused then
                written.append(ChatTemplate(tokenizer, for_tools=True).end_token)
    ids: list[int] = []
    strings = []
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for text in filter(None, written):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokens and tokens[-1] in known:  # it ends the text, whatever comes before it
            ids += [token for token in (tokens[0], tokens[-1]) if token in known]
        else:
            strings.append(text)
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids += [token for token in eos if 0 <= token < len(tokenizer)]
    unique = tuple(dict.fromkeys(ids))
    names = (tokenizer.decode([token], skip_special_tokens=False) for token in unique)
    return Ends(unique, (*names, *dict.fromkeys(strings)))


def eos_of_files(tokenizer: Any, *, offline: bool) -> list[int]:
    """Read the EOS tokens that the files beside a tokenizer name.

    `generate` stops at all of `generation_config.json`. A `config.json` may hold a number that was
    never meant for this tokenizer, so only its special tokens count.
    """
    source = tokenizer.name_or_path
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    config = _json(source, "config.json", offline)
    configs = [config, config.get("text_config")]
    named = [token for one in configs if isinstance(one, Mapping) for token in _ids(one)]
    generation = _json(source, "generation_config.json", offline)
    return [*_ids(generation), *(token for token in named if token in known)]


def _ids(settings: Mapping[str, Any]) -> list[int]:
    found = settings.get("eos_token_id")
    return [one for one in (found if isinstance(found, list) else [found]) if type(one) is int]


def _json(source: str, name: str, offline: bool) -> Mapping[str, Any]:
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, local_files_only=offline) if source else None
        found = json.loads(Path(path).read_text("utf-8")) if path else {}
    except (OSError, ValueError):  # it has none, or one that loading the model refuses
        return {}
    return found if isinstance(found, Mapping) else {}
