"""`SWEPT`: a tiny configuration of every architecture, with the embedded model's vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "reference"))

from tiny_models import (
    DELTA,
    FULL,
    GEMMA4,
    GROUPED,
    LINEAR,
    LOCAL,
    MLA,
    ROUTED,
    SIDES,
    SLIDING,
    TINY,
    TOWER,
    VOCABULARY,
    WINDOW,
)
from tiny_models import write_model as write_model

NUMBERS = {"embedded": 49152, "sentencepiece": 420}
"""Tokens of the two tokenizers."""

SENTENCEPIECE = {
    "bitnet", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma4", "gemma4_text",
    "gemma4_text, keys shared by layers", "gemma4_unified", "minicpm3", "nemotron", "phi3",
}  # fmt: skip
"""Types whose converter to GGUF wants a tokenizer of SentencePiece."""

GLM = {"glm", "glm4", "glm4_moe", "glm4_moe_lite"}
"""Types whose converter wants these special tokens."""

GLM_TOKENS = ("[gMASK]", "<|user|>", "<|observation|>")


def _text(model_type: str, **own: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIDES, **own}


MORE: dict[str, dict[str, Any]] = {
    # no dense layers, as on the hub
    "qwen3_moe": _text("qwen3_moe", head_dim=8, norm_topk_prob=True, **ROUTED),
    "starcoder2": _text("starcoder2", sliding_window=WINDOW),
    "phi": _text("phi"),
    "olmo": _text("olmo"),
    "persimmon": _text("persimmon", num_key_value_heads=4),
    "hunyuan_v1_moe": _text("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=2),
    "gpt_neo": {
        "model_type": "gpt_neo", "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2,
        "num_heads": 4, "intermediate_size": None, "window_size": WINDOW, "resid_dropout": 0.0,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "embed_dropout": 0.0, "attention_dropout": 0.0,
    },
    "openai-gpt": {
        "model_type": "openai-gpt", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3,
        "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "falcon_mamba": {
        "model_type": "falcon_mamba", "vocab_size": VOCABULARY, "hidden_size": 32,
        "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 2, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "deepseek_v32": _text(
        "deepseek_v32", first_k_dense_replace=1, index_n_heads=2, index_head_dim=8, index_topk=8,
        **(GROUPED | MLA),
    ),
    "bert": _text("bert"),
    "bart": {
        "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256,
    },
    "cohere": _text("cohere", logit_scale=0.25),
    "falcon": _text("falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "internlm3": _text("internlm3", head_dim=8),
    "nemotron": _text("nemotron"),
    "olmo2": _text("olmo2"),
    "olmoe": _text("olmoe", **ROUTED),
    "seed_oss": _text("seed_oss", head_dim=8),
    "apertus": _text("apertus"),
    "bitnet": _text("bitnet"),
    "helium": _text("helium", head_dim=8),
    "arcee": _text("arcee"),
    "dots1": _text("dots1", head_dim=8, first_k_dense_replace=1, **GROUPED),
    "glm": _text("glm", head_dim=8),
    "ernie4_5": _text("ernie4_5", head_dim=8),
    "gemma": _text("gemma", head_dim=8),
    "gpt_bigcode": {
        "model_type": "gpt_bigcode", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3,
        "n_head": 4, "n_inner": 48, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    },
    "codegen": {
        "model_type": "codegen", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3,
        "n_head": 4, "rotary_dim": 4, "n_positions": 256, "n_ctx": 256, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gptj": {
        "model_type": "gptj", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "rotary_dim": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "bloom": {
        "model_type": "bloom", "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3,
        "n_head": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    },
    "mpt": {
        "model_type": "mpt", "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4,
        "expansion_ratio": 2, "max_seq_len": 2048, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2_moe": _text(
        "qwen2_moe", shared_expert_intermediate_size=16, sliding_window=WINDOW,
        use_sliding_window=False, **ROUTED,
    ),
    "deepseek_v2": _text("deepseek_v2", first_k_dense_replace=1, **(GROUPED | MLA)),
    "minicpm3": _text("minicpm3", **MLA),
    "granitemoe": _text("granitemoe", **LOCAL),
    "granitemoeshared": _text("granitemoeshared", shared_intermediate_size=16, **LOCAL),
    "ministral": _text("ministral", head_dim=8, **SLIDING),
    "nanochat": _text("nanochat"),
    "mamba": {
        "model_type": "mamba", "vocab_size": VOCABULARY, "hidden_size": 32,
        "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 2, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "recurrent_gemma": _text(
        "recurrent_gemma", head_dim=8, lru_width=32, attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "bamba": _text(
        "bamba", attn_layer_indices=[2], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8, mamba_n_groups=1,
    ),
    "gemma4_text, experts": _text(
        "gemma4_text", **GEMMA4, **SLIDING, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16,
    ),
    "gpt_oss": _text("gpt_oss", head_dim=8, **SLIDING, **LOCAL),
    "kimi_linear": _text(
        "kimi_linear", layer_types=[LINEAR, LINEAR, FULL], num_experts=4, num_experts_per_token=2,
        num_shared_experts=1, moe_intermediate_size=16, linear_head_dim=8, linear_num_heads=4,
        mlp_layer_types=["dense", "sparse", "sparse"], **(MLA | {"q_lora_rank": None}),
    ),
    "olmo_hybrid": _text("olmo_hybrid", layer_types=[LINEAR, LINEAR, FULL], **DELTA),
    "mimo_v2_flash": _text(
        "mimo_v2_flash", head_dim=12, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16,
        mlp_layer_types=["dense", "sparse", "sparse"], **SLIDING,
    ),
    "llama4": {
        "model_type": "llama4",
        "text_config": TINY["llama4_text"],
        "vision_config": {
            "model_type": "llama4_vision_model", **TOWER, "vision_output_dim": 32,
            "projector_input_dim": 32, "projector_output_dim": 32,
        },
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": _text(
            "qwen2_5_vl_text",
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        ),
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 1, "hidden_size": 16, "intermediate_size": 32,
            "num_heads": 2, "out_hidden_size": 32, "patch_size": 8, "fullatt_block_indexes": [0],
        },
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": _text(
            "qwen3_vl_text", head_dim=8,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        ),
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 1, "hidden_size": 16, "intermediate_size": 32,
            "num_heads": 2, "out_hidden_size": 32, "patch_size": 8, "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
    },
    "llava": {
        "model_type": "llava",
        "text_config": _text("llama"),
        "vision_config": {"model_type": "clip_vision_model", **TOWER, "projection_dim": 16},
        "image_token_index": 10,
    },
    "muse_glimmer": {
        "model_type": "muse_glimmer",
        "text_config": _text(
            "muse_glimmer_text", head_dim=8, final_logit_softcapping=20.0, qk_scale_factor=2.0,
            output_multiplier=0.5, layer_rope_theta=[1e4, 1e4, 0], **SLIDING,
        ),
        "vision_config": {
            "model_type": "muse_glimmer_vision", "patch_size": 8, "pos_emb_height": 4,
            "pos_emb_width": 4, "num_attention_heads": 2, "num_hidden_layers": 2,
            "hidden_size": 16, "intermediate_size": 32,
            "layer_types": ["window_attention", FULL],
        },
        "image_token_id": 5, "video_token_id": 6, "out_hidden_size": 64,
        "projector_hidden_size": 16,
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "text_config": _text(
            "gemma4_unified_text", head_dim=8, global_head_dim=16, final_logit_softcapping=30.0,
            **SLIDING,
        ),
        "vision_config": {
            "model_type": "gemma4_unified_vision", "patch_size": 4, "mm_embed_dim": 16,
            "mm_posemb_size": 8, "output_proj_dims": 16,
        },
        "audio_config": None, "image_token_id": 5, "video_token_id": 6, "boi_token_id": 7,
        "eoi_token_id": 8, "boa_token_id": 9, "eoa_token_index": 10, "audio_token_id": 11,
    },
}  # fmt: skip


def _with_vocabulary(sides: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in sides.items():
        if isinstance(value, dict):
            found[name] = _with_vocabulary(value, tokens)
        else:
            is_size = name.startswith("vocab_size") and value == VOCABULARY
            found[name] = tokens if is_size else value
    return found


def _tokens_of(name: str) -> int:
    return NUMBERS["sentencepiece" if name in SENTENCEPIECE else "embedded"]


SWEPT = {name: _with_vocabulary(sides, _tokens_of(name)) for name, sides in (TINY | MORE).items()}

PREDICTING = {"qwen3_next", "qwen3_5", "qwen3_5_moe"}
"""Types whose checkpoints hold a head for more tokens, which transformers does not load."""

REFUSED: dict[str, str] = {
    "deepseek_v32": "an indexer in each layer of a deepseek_v32 chooses which tokens are seen",
    "bert": "in this bert a token sees those that come after it",
    "bart": "got no gradient in 2 updates: .*encoder_attn",  # kept by its class for text alone
}
"""Types that are refused, and what the sentence says; each is true of the type."""
