"""Data preparation: ours against TRL's, on the same chats with the same tokenizer.

Three sets: `english` words with the embedded model's tokenizer, about 300 tokens a chat; `numbered`
words with a tokenizer that costs next to nothing, 300 tokens a chat; and `mixed lengths`, the same
with lengths like those of real chats, for the fill.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from strixft.bench.result import BenchRow, Options
from strixft.data.words import Words
from strixft.prepare.stage import prepare_data
from strixft.recipe.load import check_recipe
from strixft.support.units import GIB

MAX_LENGTH = 2048

PEER_ROWS = 20_000
"""Most rows on which TRL is timed; it takes each row by itself."""

SETS = ("english", "numbered", "mixed lengths")


class DataOptions(Options):
    """Time the whole preparation, from a file to packed rows on disk, with a warm tokenizer."""

    rows: int = Field(6000, ge=1, description="Chats of each set.")
    repeat: int = Field(3, ge=1, description="Turns, of which the fastest counts.")
    peer: bool = Field(True, description="Also time TRL's preparation.")


def _cpu_seconds() -> float:
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars on standard error while the clock runs."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        yield


def _ours(path: Path, tokenizer: Any, words: Words) -> dict[str, Any]:
    recipe = check_recipe(
        {"model": "bench", "dataset": {"source": str(path), "max_length": MAX_LENGTH}},
        name="bench",
    )
    target = Path(tempfile.mkdtemp(dir=path.parent))
    _, figures = prepare_data(recipe, target, tokenizer, words=words)
    shutil.rmtree(target)
    return figures


def _trainer(tokenizer: Any, folder: Path, processes: int | None) -> Any:
    """Make TRL's trainer of a tiny model; only its preparation is used."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        dataset_num_proc=processes,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": [0, 1], "labels": [0, 1]}]),
        processing_class=tokenizer,
    )
    trainer.args.assistant_only_loss = True  # the constructor would look for chats in its rows
    return trainer


def _peer(path: Path, tokenizer: Any, trainer: Any) -> dict[str, Any]:
    from datasets import load_dataset

    rows = load_dataset(
        "json", data_files=str(path), split="train", cache_dir=tempfile.mkdtemp(dir=path.parent)
    )
    packed = trainer._prepare_dataset(
        rows, tokenizer, trainer.args, packing=True, formatting_func=None, dataset_name="bench"
    )
    tokens = sum(map(len, packed["input_ids"]))
    trained = sum(label != -100 for labels in packed["labels"] for label in labels)
    fill = tokens / (len(packed) * MAX_LENGTH)
    return {"tokens": tokens, "trained_tokens": trained, "packing": {"fill": round(fill, 4)}}


def _preparations(
    path: Path, tokenizer: Any, *, peer: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the preparations to time, warmed up, by name."""
    words = Words(tokenizer.backend_tokenizer)
    _ours(path, tokenizer, words)
    works: dict[str, Callable[[], Any]] = {"strixft": lambda: _ours(path, tokenizer, words)}
    for processes in (None, os.cpu_count()) if peer else ():
        trainer = _trainer(tokenizer, path.parent, processes)
        name = f"TRL, {processes or 1} processes"
        works[name] = lambda trainer=trainer: _peer(path, tokenizer, trainer)  # type: ignore[misc]
    return works


def _bench_set(kind: str, options: DataOptions, folder: Path) -> list[BenchRow]:
    rng, count = random.Random(0), options.rows
    if kind == "english":
        tokenizer = real_tokenizer()
        word = real_words(rng, tokenizer)
    else:
        tokenizer, word = numbered_tokenizer(), numbered_words(rng)
    length = {
        "english": lambda: lengths_alike(rng),
        "numbered": lambda: 290,
        "mixed lengths": lambda: lengths_of_chats(rng, MAX_LENGTH),
    }[kind]
    path = write_chats(folder / f"{kind.replace(' ', '-')}.jsonl", count, word, length)
    peer = options.peer and count <= PEER_ROWS and kind != "mixed lengths"
    best: dict[str, tuple[float, float, dict[str, Any]]] = {}
    with _quiet():
        works = _preparations(path, tokenizer, peer=peer)
        for _ in range(options.repeat):  # in turns, so that a busy machine disturbs all alike
            for name, work in works.items():
                clock, cpu = time.monotonic(), _cpu_seconds()
                figures = work()
                timed = time.monotonic() - clock, _cpu_seconds() - cpu, figures
                best[name] = min(best.get(name, timed), timed, key=lambda one: one[0])
    return [
        {
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
        for name, (seconds, cpu, figures) in best.items()
    ]


def bench_data(options: DataOptions) -> list[BenchRow]:
    """Time the preparation of three sets of chats."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for kind in SETS for row in _bench_set(kind, options, Path(folder))]
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [{**row, "process_peak_gib": round(peak_bytes / GIB, 2)} for row in rows]


# Chats to prepare.

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
"""The same with spaces, for a tokenizer that splits at them."""

NUM_NUMBERED = 100_000


def numbered_tokenizer() -> Any:
    """Make a tokenizer whose words are w0, w1, …: it costs next to nothing."""
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
    """Load the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    from strixft.model.files import EMBEDDED
    from strixft.model.load import model_source

    tokenizer = AutoTokenizer.from_pretrained(model_source(next(iter(EMBEDDED))))
    tokenizer.chat_template = CHATML
    return tokenizer


def numbered_words(rng: random.Random) -> Callable[[], str]:
    """Return a function that draws words of the numbered tokenizer, all equally often."""
    return lambda: f"w{rng.randrange(NUM_NUMBERED)}"


def real_words(rng: random.Random, tokenizer: Any) -> Callable[[], str]:
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


def lengths_alike(rng: random.Random) -> int:
    """Draw the number of words of a chat of about 300 tokens."""
    return rng.randrange(200, 260)


def lengths_of_chats(rng: random.Random, max_length: int) -> int:
    """Draw the words of a chat like real ones: median 245 tokens, mean about 340, a long tail."""
    return max(24, min(max_length - 16, int(rng.lognormvariate(5.5, 0.8))))


def write_chats(path: Path, count: int, word: Callable[[], str], length: Callable[[], int]) -> Path:
    """Write chats of a question and an answer, twice as long, as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            total = length()
            asked = max(4, total // 3)
            messages = [
                {"role": role, "content": " ".join(word() for _ in range(words))}
                for role, words in (("user", asked), ("assistant", total - asked))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
