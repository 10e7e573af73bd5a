"""Preparing data: ours against TRL's own, on the same chats with the same tokenizer."""

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

from strixft.bench import data
from strixft.data.words import Words
from strixft.prepare.stage import prepare_data
from strixft.recipe.load import check_recipe
from strixft.support.units import GIB

MAX_LENGTH = 2048

PEER_ROWS = 20_000
"""The peer is timed on this many rows at most; it takes each row by itself."""


Timed = tuple[float, float, Any]
"""Seconds of the clock, seconds of processors, and the result."""


def _cpu_seconds() -> float:
    own, children = (
        resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _timed(work: Callable[[], Any]) -> Timed:
    clock, cpu = time.monotonic(), _cpu_seconds()
    result = work()
    return time.monotonic() - clock, _cpu_seconds() - cpu, result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars on standard error while the clock runs."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        yield


def _ours(path: Path, tokenizer: Any, folder: Path, words: Words) -> dict[str, Any]:
    recipe = check_recipe(
        {"model": "bench", "dataset": {"source": str(path), "max_length": MAX_LENGTH}},
        name="bench",
    )
    target = Path(tempfile.mkdtemp(dir=folder))
    _, figures = prepare_data(recipe, target, tokenizer, words=words)
    for file in target.iterdir():
        file.unlink()
    return figures


def _trainer(tokenizer: Any, folder: Path, processes: int | None) -> Any:
    """TRL's trainer on a model of no size: only its preparation is used."""
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
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [0, 1], "labels": [0, 1]}])
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.args.assistant_only_loss = True  # the constructor would look for chats in `rows`
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


def _row(name: str, kind: str, count: int, timed: Timed) -> dict[str, Any]:
    seconds, cpu, figures = timed
    return {
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


def _best(repeat: int, works: dict[str, Callable[[], Any]]) -> dict[str, Timed]:
    """The fastest of some turns; the candidates take turns, so that a busy machine hits all."""
    best: dict[str, Timed] = {}
    for _ in range(repeat):
        for name, work in works.items():
            timed = _timed(work)
            if name not in best or timed[0] < best[name][0]:
                best[name] = timed
    return best


def _bench_set(
    kind: str, count: int, repeat: int, peer: bool, folder: Path
) -> list[dict[str, Any]]:
    rng = random.Random(0)
    numbered = kind != "english"
    tokenizer = data.numbered_tokenizer() if numbered else data.real_tokenizer()
    word = data.numbered_words(rng) if numbered else data.real_words(rng, tokenizer)
    length = {
        "english": lambda: data.lengths_alike(rng),
        "numbered": lambda: 290,
        "mixed lengths": lambda: data.lengths_of_chats(rng, MAX_LENGTH),
    }[kind]
    path = data.write_chats(folder / f"{kind.replace(' ', '-')}.jsonl", count, word, length)
    words = Words(tokenizer.backend_tokenizer)
    with _quiet():
        _ours(path, tokenizer, folder, words)  # warm
    works = {"strixft": lambda: _ours(path, tokenizer, folder, words)}
    if peer:
        works |= _peers(path, tokenizer, folder)
    with _quiet():
        best = _best(repeat, works)
    return [_row(name, kind, count, timed) for name, timed in best.items()]


def _peers(path: Path, tokenizer: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    works: dict[str, Callable[[], Any]] = {}
    for processes in (None, os.cpu_count()):
        with _quiet():
            trainer = _trainer(tokenizer, folder, processes)

        def work(trainer: Any = trainer) -> dict[str, Any]:
            return _peer(path, tokenizer, trainer)

        works[f"TRL, {processes or 1} processes"] = work
    return works


def bench_data(rows: int = 6000, repeat: int = 3, peer: bool = True) -> list[dict[str, Any]]:
    """Time the whole preparation, from a file to packed rows on disk, with a warm tokenizer.

    Three sets: English words with the embedded model's tokenizer and about 300 tokens a chat;
    numbered words with a tokenizer that costs next to nothing, 300 tokens a chat; and the same with
    lengths as chats have them, for the fill.

    Args:
        rows: Chats of each set.
        repeat: Turns, of which the fastest counts.
        peer: Time TRL's preparation too.
    """
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for kind in ("english", "numbered", "mixed lengths"):
            beside = peer and rows <= PEER_ROWS and kind != "mixed lengths"
            found += _bench_set(kind, rows, repeat, beside, Path(name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [{**row, "process_peak_gib": round(peak / GIB, 2)} for row in found]


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

    from strixft.model.embedded import EMBEDDED
    from strixft.model.load import model_source

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
