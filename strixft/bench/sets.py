"""Chats made from a seed, and the tokenizers to read them with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with the marks by which TRL finds answers; they do not change the text."""
SPACED = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <|im_end|> "
    "{% endgeneration %}{% else %}{{ m['content'] }} <|im_end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
NUM_NUMBERED = 100_000


def numbered_tokenizer() -> Any:
    """A tokenizer whose words are w0, w1, …: it costs next to nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|im_end|>", "<|pad|>", "<unk>", "<|im_start|>", "user", "assistant"]
    words = [*special, *(f"w{number}" for number in range(NUM_NUMBERED))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = SPACED
    return tokenizer


def real_tokenizer() -> Any:
    """The embedded model's tokenizer."""
    from transformers import AutoTokenizer

    from strixft.model import EMBEDDED, model_source

    tokenizer = AutoTokenizer.from_pretrained(model_source(next(iter(EMBEDDED))))
    tokenizer.chat_template = CHATML
    return tokenizer


def numbered_words(rng: random.Random) -> Callable[[], str]:
    """Draws words of the numbered tokenizer, all equally often."""
    return lambda: f"w{rng.randrange(NUM_NUMBERED)}"


def real_words(rng: random.Random, tokenizer: Any) -> Callable[[], str]:
    """Draws English words, common ones more often (Zipf), a quarter made of two tokens."""
    known = [token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ")]
    words = sorted(word for word in known if word.isascii() and word.isalpha() and len(word) > 1)
    rng.shuffle(words)
    tails = [word for word in words if word.islower() and len(word) > 3]
    pairs = [word + rng.choice(tails) for word in words[::4]]
    every = words + pairs
    rng.shuffle(every)
    weights = [1 / (rank + 2) for rank in range(len(every))]

    def drawn() -> Iterator[str]:
        while True:
            yield from rng.choices(every, weights, k=100_000)

    return drawn().__next__


def lengths_alike(rng: random.Random) -> int:
    """Words of a chat of about 300 tokens."""
    return rng.randrange(200, 260)


def lengths_of_chats(rng: random.Random, max_length: int) -> int:
    """Words of a chat as chats are: median 245 tokens, mean about 340, a long tail."""
    return max(24, min(max_length - 16, int(rng.lognormvariate(5.5, 0.8))))


def write_chats(path: Path, count: int, word: Callable[[], str], length: Callable[[], int]) -> Path:
    """Write chats of a question and an answer, twice as long, as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            total = length()
            asked = max(4, total // 3)
            texts = [" ".join(word() for _ in range(n)) for n in (asked, total - asked)]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
