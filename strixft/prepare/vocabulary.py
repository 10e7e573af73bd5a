"""Does the model have an embedding for every token of the data?"""

from __future__ import annotations

import pyarrow.compute as pc

from strixft.errors import RecipeError
from strixft.model import load_config, load_tokenizer
from strixft.prepare import Prepared
from strixft.recipe import Recipe

_RESIZE = (
    """python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; """
    """t = T.from_pretrained('{0}'); m = M.from_pretrained('{0}', dtype='auto'); """
    """m.resize_token_embeddings(len(t)); """
    """m.save_pretrained('resized'); t.save_pretrained('resized')", then model: resized"""
)


def require_known_tokens(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse data with tokens that were added to the tokenizer and not to the model.

    Raises:
        RecipeError: With a command that makes room for them.
    """
    rows = prepared.token_rows(recipe.dataset).train.data.column("input_ids")
    largest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in rows.chunks), default=0)
    known = load_config(recipe).get_text_config().vocab_size
    if largest >= known:
        token = load_tokenizer(recipe).convert_ids_to_tokens(largest)
        raise RecipeError(
            f"the data have the token {token!r}, number {largest}, and {recipe.model} has"
            f" embeddings for {known}: the token was added to the tokenizer alone",
            fix=_RESIZE.format(recipe.model),
        )
