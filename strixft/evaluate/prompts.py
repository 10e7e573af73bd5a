"""Prompts of the user's own, as the model reads them."""

from __future__ import annotations

from typing import Any


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """A prompt as the first message of a chat; as plain text where there is no chat template.

    Args:
        tokenizer: The model's.
        text: What the user says.
    """
    if not tokenizer.chat_template:
        plain: list[int] = tokenizer(text)["input_ids"]
        return plain
    chat = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids
