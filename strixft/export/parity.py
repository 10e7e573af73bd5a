"""Parity: exported and trained model answer the same prompts, compared token by token."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strixft.catalog.exports import Quantisation
from strixft.data.end_tokens import Ends
from strixft.evaluate.generate import generate
from strixft.servers.llama_cpp import ANY_TEMPLATE, TemplateError, served
from strixft.support.errors import HostError
from strixft.support.http import ask
from strixft.support.progress import progress_bar

PROMPTS = 50
"""Fewest prompts; general questions are added if fewer rows are held out."""

ANSWER_TOKENS = 24
"""Most tokens of an answer that are compared."""

ANSWER_S = 900.0
"""Longest wait for an answer: a 70B on processor cores reads 8 tokens a second."""

END = -1
"""Stand-in for any token that ends an answer."""

_THINGS = (
    "rain", "iron", "a bridge", "the moon", "bread", "a violin", "electricity", "a river", "salt",
    "gravity", "a clock", "wood", "a library", "the heart", "glass", "a volcano", "paper", "wind",
    "a compass", "milk", "a forest", "sound", "a mirror", "coal", "a seed",
)  # fmt: skip

_REQUESTS = ("What is {}?", "Say two sentences about {}.")

QUESTIONS = tuple(request.format(thing) for request in _REQUESTS for thing in _THINGS)


Prompt = tuple[list[int], list[int]]
"""Tokens of a prompt, and the trained model's greedy answer to it."""


def chosen_prompts(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the prompts of held-out rows, and general questions where they are too few.

    Args:
        tokenizer: The model's.
        rows: Held-out token rows.
    """
    prompts = [list(row["input_ids"][: row["prompt_tokens"]]) for row in rows[:PROMPTS]]
    if tokenizer.chat_template:
        for question in QUESTIONS[: PROMPTS - len(prompts)]:
            chat = [{"role": "user", "content": question}]
            rendered = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=True
            )
            prompts.append(rendered["input_ids"])
    return prompts


def greedy_answers(
    model: Any, tokenizer: Any, ends: Ends, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Return the greedy answers of a model in evaluation mode; the last token may be `END`."""
    answers = generate(model, tokenizer, ends, prompts, ANSWER_TOKENS)
    stops = frozenset(ends.token_ids)
    return [[END if token in stops else token for token in answer] for answer in answers]


def _answer(url: str, prompt: list[int], num_tokens: int) -> list[int]:
    body = {
        "prompt": prompt,
        "n_predict": num_tokens,
        "temperature": 0,
        "repeat_penalty": 1.0,
        "return_tokens": True,
        "cache_prompt": True,
    }
    answer = ask(f"{url}/completion", body, ANSWER_S)
    tokens: list[int] = answer["tokens"]
    ended = answer.get("stop_type") == "eos"  # the end token is the last of them
    return [*tokens[:-1], END] if ended else tokens


def compare(url: str, prompt: list[int], wanted: list[int]) -> tuple[int, int]:
    """Return the tokens before the first difference, and the positions with the same choice.

    After a difference the server continues from the trained model's own words.
    """
    first, agreed, start = -1, 0, 0
    while start < len(wanted):
        got = _answer(url, prompt + wanted[:start], len(wanted) - start)
        pairs = zip(got, wanted[start:], strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        first = same if first < 0 else first
        agreed += same
        start += same + 1
    return max(first, 0), agreed


def _same_tokens(url: str, tokenizer: Any, prompts: Sequence[list[int]]) -> float:
    """Return the share of prompts that llama.cpp's tokenizer splits as the model's does."""
    equal = 0
    for prompt in prompts:
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        body = {"content": text, "add_special": False, "parse_special": True}
        equal += ask(f"{url}/tokenize", body, ANSWER_S)["tokens"] == list(prompt)
    return equal / len(prompts)


def _same_template(url: str, tokenizer: Any) -> bool | str:
    """Check that llama.cpp renders a chat as the template does; return its error if it cannot."""
    if not tokenizer.chat_template:
        return True
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    try:
        theirs = ask(f"{url}/apply-template", {"messages": chat}, ANSWER_S)["prompt"]
    except HostError as error:
        return error.problem
    bos = tokenizer.bos_token or ""
    return bool(theirs.removeprefix(bos) == ours.removeprefix(bos))


def measure_parity(
    model: Path,
    kind: Quantisation,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Serve a GGUF file with llama.cpp and compare it with the trained model's answers.

    Args:
        model: The file.
        kind: Its quantisation.
        tokenizer: Tokenizer of the trained model.
        prompts: Prompts with the trained model's answers.
        adapter: GGUF file of an adapter that the server applies to the model.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in prompts) + 8
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(served(model, longest, adapter))
            same_template = _same_template(url, tokenizer)
        except TemplateError as error:  # tokens can still be compared
            url = stack.enter_context(served(model, longest, adapter, ANY_TEMPLATE))
            same_template = error.problem
        same_tokens = _same_tokens(url, tokenizer, [prompt for prompt, _ in prompts])
        bar = progress_bar(prompts, unit="prompt", desc=kind.name)
        found = [compare(url, prompt, wanted) for prompt, wanted in bar]
    tokens = sum(len(wanted) for _, wanted in prompts)
    top1 = sum(agreed for _, agreed in found) / tokens
    greedy = statistics.fmean(
        first / len(wanted) for (first, _), (_, wanted) in zip(found, prompts, strict=True)
    )
    enough = top1 >= kind.least_top1 and greedy >= kind.least_greedy
    return {
        "top1": round(top1, 4),
        "greedy": round(greedy, 4),
        "least_top1": kind.least_top1,
        "least_greedy": kind.least_greedy,
        "prompts": len(prompts),
        "tokens": tokens,
        "same_tokens": same_tokens,
        "same_template": same_template,
        "passes": enough and same_tokens == 1 and same_template is True,
    }
