"""Greedy answers, many prompts at once.

Shapes: B prompts, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strixft.data.end_tokens import Ends
from strixft.evaluate.losses import groups_of
from strixft.support.progress import progress_bar

AT_ONCE = 16
"""Prompts in one batch if the caller gives no limit."""


def generate(
    model: Any,
    tokenizer: Any,
    ends: Ends,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    most_tokens: int | None = None,
    look: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Answer prompts greedily; an answer's tokens end with its end token.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        ends: Ends of its answers.
        prompts: Tokens of each prompt, up to where the answer starts.
        max_new_tokens: Longest answer.
        most_tokens: Largest batch, padding and answers included; `AT_ONCE` prompts if not given.
        look: Called before each batch.
    """
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    most = most_tokens if most_tokens is not None else AT_ONCE * max(lengths, default=0)
    found: dict[int, list[int]] = {}
    for group in progress_bar(groups_of(lengths, most), unit="batch", desc="answers"):
        look()
        answers = _answer_batch(
            model, tokenizer, ends, [prompts[index] for index in group], max_new_tokens
        )
        found |= dict(zip(group, answers, strict=True))
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def _answer_batch(
    model: Any, tokenizer: Any, ends: Ends, prompts: Sequence[Sequence[int]], most: int
) -> list[list[int]]:
    settings = ends.settings(tokenizer)
    pad = settings["pad_token_id"]
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad))
    produced = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        **settings,
    )
    answers = [ends.cut(row) for row in produced[:, ids.shape[1] :].tolist()]
    for answer in answers:
        # an answer that ended with a text is padded while others of its batch go on
        while answer and answer[-1] == pad and pad not in ends.token_ids:
            answer.pop()
    return answers


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return prompts as one batch whose ends meet: ids and mask, both (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def prompt_tokens(tokenizer: Any, text: str, kwargs: Mapping[str, Any]) -> list[int]:
    """Tokenise a prompt as the first message of a chat, or as plain text without a template.

    Args:
        tokenizer: The model's.
        text: The prompt.
        kwargs: Variables of the chat template.
    """
    if not tokenizer.chat_template:
        plain: list[int] = tokenizer(text)["input_ids"]
        return plain
    chat = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, **kwargs
    )
    ids: list[int] = encoded["input_ids"]
    return ids
