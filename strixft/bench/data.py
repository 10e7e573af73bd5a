"""Data preparation: ours against TRL's, on the same chats with the embedded model's tokenizer.

Three sets of about 300 tokens a chat: `english` words as often as in texts; `numbered` words, of
which hardly one comes twice; and `mixed lengths`, English with lengths like those of real chats.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from strixft.bench.run import Bench, BenchRow
from strixft.data.word_cache import Words
from strixft.model.files import EMBEDDED
from strixft.model.source import model_source
from strixft.prepare.stage import prepare_data
from strixft.recipe.load import check_recipe
from strixft.support.errors import HostError
from strixft.support.units import GIB

MAX_LENGTH = 2048

PEER_ROWS = 20_000
"""Most rows on which TRL is timed; it takes each row by itself."""

TOKENS_PER_WORD = 1.43
"""Mean of `english_words`."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with the marks by which TRL finds answers; they do not change the text."""

Prepare = Callable[[], dict[str, Any]]
"""Prepares a set and returns `tokens`, `trained_tokens` and `packing`."""


class Data(Bench):
    """Time the whole preparation, from a file to packed rows on disk, with a warm tokenizer."""

    rows: int = Field(6000, ge=1, description="Chats of each set.")
    repeat: int = Field(3, ge=1, description="Turns, of which the fastest counts.")
    peer: bool = Field(True, description="Also time TRL's preparation.")

    def measure(self) -> list[BenchRow]:
        """Time the preparation of three sets of chats."""
        import datasets

        if self.peer:
            _trl()
        datasets.disable_caching()
        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory() as folder:
            rows = [row for kind in SETS for row in self._rows(kind, Path(folder))]
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return [{**row, "process_peak_gib": round(peak_bytes / GIB, 2)} for row in rows]

    def _rows(self, kind: str, folder: Path) -> Iterator[BenchRow]:
        tokenizer, count = embedded_tokenizer(), self.rows
        path = write_chats(folder / f"{kind.replace(' ', '-')}.jsonl", count, kind, tokenizer)
        peer = self.peer and count <= PEER_ROWS and kind != "mixed lengths"
        best: dict[str, tuple[float, float, dict[str, Any]]] = {}
        # no progress bars while the clock runs
        with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
            works = _preparations(path, tokenizer, peer=peer)
            for _ in range(self.repeat):  # in turns, so that a busy machine disturbs all alike
                for name, work in works.items():
                    clock, cpu = time.monotonic(), _cpu_seconds()
                    figures = work()
                    timed = time.monotonic() - clock, _cpu_seconds() - cpu, figures
                    best[name] = min(best.get(name, timed), timed, key=lambda one: one[0])
        for name, (seconds, cpu, figures) in best.items():
            yield {
                "set": kind,
                "preparation": name,
                "chats": count,
                "tokens_per_chat": round(figures["tokens"] / count, 1),
                "chats_per_s": round(count / seconds, 1),
                "tok_per_s": round(figures["tokens"] / seconds),
                "cpu_ms_per_chat": round(cpu / count * 1000, 3),
                "fill": figures["packing"]["fill"],
                "trained_tokens": figures["trained_tokens"],
            }


def _trl() -> Any:
    try:
        import trl
    except ModuleNotFoundError as error:
        raise HostError(
            "TRL, whose preparation is timed beside ours, is not installed",
            fix="pip install 'strixft[dev]'; or --no-peer",
        ) from error
    return trl


def _cpu_seconds() -> float:
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _preparations(path: Path, tokenizer: Any, *, peer: bool) -> dict[str, Prepare]:
    """Return the preparations to time by name, ours warmed up."""
    words = Words(tokenizer.backend_tokenizer)
    dataset = {"source": str(path), "max_length": MAX_LENGTH}
    recipe = check_recipe({"model": "bench", "dataset": dataset}, name="bench")

    def ours() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=path.parent) as target:
            return prepare_data(recipe, Path(target), tokenizer, words=words)[1]

    ours()
    works: dict[str, Prepare] = {"strixft": ours}
    for processes in (None, os.cpu_count()) if peer else ():
        works[f"TRL, {processes or 1} processes"] = _peer(path, tokenizer, processes)
    return works


def _peer(path: Path, tokenizer: Any, processes: int | None) -> Prepare:
    """Return TRL's preparation, which its trainer does when it is made; the model is tiny."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    trl = _trl()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    settings = trl.SFTConfig(
        output_dir=str(path.parent / "trl"),
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        dataset_num_proc=processes,
        assistant_only_loss=True,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = LlamaForCausalLM(config)

    def prepare() -> dict[str, Any]:
        cache = tempfile.mkdtemp(dir=path.parent)
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        packed = trl.SFTTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=tokenizer
        ).train_dataset
        tokens = sum(map(len, packed["input_ids"]))
        trained = sum(label != -100 for labels in packed["labels"] for label in labels)
        fill = tokens / (len(packed) * MAX_LENGTH)
        return {"tokens": tokens, "trained_tokens": trained, "packing": {"fill": round(fill, 4)}}

    return prepare


# Chats to prepare.


def embedded_tokenizer() -> Any:
    """Load the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_source(next(iter(EMBEDDED))))
    tokenizer.chat_template = CHATML
    return tokenizer


def english_words(rng: random.Random, tokenizer: Any) -> Callable[[], str]:
    """Return a function that draws English words by Zipf's law, a quarter of two tokens."""
    known = [token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ")]
    words = sorted(word for word in known if word.isascii() and word.isalpha() and len(word) > 1)
    rng.shuffle(words)
    tails = [word for word in words if word.islower() and len(word) > 3]
    every = words + [word + rng.choice(tails) for word in words[::4]]
    rng.shuffle(every)
    weights = [1 / (rank + 2) for rank in range(len(every))]

    def drawn() -> Iterator[str]:
        while True:
            yield from rng.choices(every, weights, k=100_000)

    return drawn().__next__


def numbered_words(rng: random.Random) -> Callable[[], str]:
    """Return a function that draws words of a letter and a number, all equally often."""
    return lambda: f"w{rng.randrange(100_000)}"


def lengths_of_chats(rng: random.Random, max_length: int) -> int:
    """Draw the tokens of a chat like real ones: median 245, mean about 340, a long tail."""
    return max(24, min(max_length - 16, int(rng.lognormvariate(5.5, 0.8))))


SETS: dict[str, Callable[[random.Random], int]] = {
    "english": lambda rng: rng.randrange(200, 260),
    "numbered": lambda rng: rng.randrange(45, 53),
    "mixed lengths": lambda rng: int(lengths_of_chats(rng, MAX_LENGTH) / TOKENS_PER_WORD),
}
"""Name of a set → the number of words of one of its chats."""


def write_chats(path: Path, count: int, kind: str, tokenizer: Any) -> Path:
    """Write chats of a question and an answer, twice as long, as JSON lines.

    Args:
        path: The file.
        count: Number of chats.
        kind: A key of `SETS`.
        tokenizer: Its vocabulary has the words.
    """
    rng = random.Random(0)
    word = numbered_words(rng) if kind == "numbered" else english_words(rng, tokenizer)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            total = SETS[kind](rng)
            asked = max(4, total // 3)
            messages = [
                {"role": role, "content": " ".join(word() for _ in range(words))}
                for role, words in (("user", asked), ("assistant", total - asked))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
