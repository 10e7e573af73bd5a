"""`FAMILIES`: what is particular about a model family, keyed by `model_type` of its `config.json`.

An unknown family works: its loss goes through the model's own head, which is right for any
architecture and needs more memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from strixft.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family."""

    name: str
    head: Literal["linear", "model"]
    """`linear`: logits are hidden states times one matrix, capped by tanh where the config's
    `final_logit_softcapping` says so; the loss can be taken in chunks.
    `model`: the head does something else to its logits; ask the model for them."""
    source: str


_MODELING = "transformers 5.23.0, models/{0}/modeling_{0}.py"

FAMILIES: Table[Family] = Table(
    "model family",
    *(
        Family(name=name, head="linear", source=_MODELING.format(name.removesuffix("_text")))
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
    ),
)
UNKNOWN = Family(name="unknown", head="model", source="no row in FAMILIES")


def family_of(model_type: str) -> Family:
    """The row of a model type, or the one that is right for any."""
    known = model_type in FAMILIES
    return FAMILIES[model_type] if known else UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers of a model's `config.json` that decide its memory and time."""

    name: str
    """Hub id."""
    config: Mapping[str, Any]
    """Arguments of `transformers.AutoConfig.for_model`."""
    source: str


def _llama(
    name: str, hidden: int, feed_forward: int, layers: int, heads: int, **more: Any
) -> ModelShape:
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    }
    return ModelShape(name=name, config=config | more, source=_CONFIG.format(name))


def _qwen3(
    name: str, hidden: int, feed_forward: int, layers: int, heads: int, **more: Any
) -> ModelShape:
    config = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }
    return ModelShape(name=name, config=config | more, source=_CONFIG.format(name))


def _gemma3(
    name: str, hidden: int, feed_forward: int, layers: int, heads: tuple[int, int], **more: Any
) -> ModelShape:
    config = {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    }
    return ModelShape(name=name, config=config | more, source=_CONFIG.format(name))


_CONFIG = "https://huggingface.co/{}/blob/main/config.json"

MODELS: Table[ModelShape] = Table(
    "model shape",
    _gemma3(
        "google/gemma-3-1b-it",
        1152,
        6912,
        26,
        (4, 1),
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
    ),
    _gemma3("google/gemma-3-4b-it", 2560, 10240, 34, (8, 4)),
    _gemma3("google/gemma-3-12b-it", 3840, 15360, 48, (16, 8)),
    _gemma3("google/gemma-3-27b-it", 5376, 21504, 62, (32, 16), head_dim=128),
    ModelShape(
        name="google/gemma-2-27b-it",
        config={
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
        },
        source=_CONFIG.format("google/gemma-2-27b-it"),
    ),
    _qwen3("Qwen/Qwen3-4B", 2560, 9728, 36, 32, tie_word_embeddings=True),
    _qwen3("Qwen/Qwen3-8B", 4096, 12288, 36, 32),
    _qwen3("Qwen/Qwen3-14B", 5120, 17408, 40, 40),
    _qwen3("Qwen/Qwen3-32B", 5120, 25600, 64, 64),
    _llama(
        "meta-llama/Llama-3.2-1B-Instruct",
        2048,
        8192,
        16,
        32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    _llama("meta-llama/Llama-3.1-8B-Instruct", 4096, 14336, 32, 32),
    _llama("meta-llama/Llama-3.3-70B-Instruct", 8192, 28672, 80, 64),
    _llama("meta-llama/Llama-3.1-405B-Instruct", 16384, 53248, 126, 128),
    _llama("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 4096, 14336, 32, 32),
    _llama("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", 8192, 28672, 80, 64),
    _qwen3(
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        4096,
        12288,
        36,
        32,
        max_position_embeddings=131072,
    ),
    ModelShape(
        name="mistralai/Mistral-Small-24B-Instruct-2501",
        config={
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": None,
            "max_position_embeddings": 32768,
        },
        source=_CONFIG.format("mistralai/Mistral-Small-24B-Instruct-2501"),
    ),
)
