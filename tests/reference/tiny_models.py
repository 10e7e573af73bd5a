"""`TINY`: a tiny configuration of each model type; windows are shorter than the documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from strixft.catalog.models import MODELS

SLIDE, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
WINDOW = 8
VOCABULARY = 211
SIDES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": [SLIDE, SLIDE, FULL]}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 4,
}
GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING}
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
}
QWEN35 = {
    "mtp_num_hidden_layers": 1,
    "full_attention_interval": 3,
    "head_dim": 8,
    "layer_types": [LINEAR, LINEAR, FULL],
    **DELTA,
}


def _text(model_type: str, **own: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIDES, **own}


TINY: dict[str, dict[str, Any]] = {
    "llama": _text("llama"),
    "llama, a window that its class does not use": _text("llama", sliding_window=WINDOW),
    "mistral": _text("mistral", head_dim=8, sliding_window=WINDOW),
    "ministral3": _text("ministral3", head_dim=8, sliding_window=None),
    "mistral3": {
        "model_type": "mistral3",
        "text_config": _text("mistral", head_dim=8, sliding_window=None),
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
        "image_token_index": 10,
    },
    "qwen2": _text("qwen2", sliding_window=WINDOW, use_sliding_window=False),
    "qwen2, windows from a layer on": _text(
        "qwen2", sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": _text("qwen3", head_dim=8),
    "qwen3_moe": _text("qwen3_moe", head_dim=8, mlp_only_layers=[0], **ROUTED),
    "qwen3_next": _text("qwen3_next", shared_expert_intermediate_size=16, **QWEN35, **ROUTED),
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": _text("qwen3_5_text", **QWEN35),
        "vision_config": QWEN_TOWER | {"model_type": "qwen3_5_vision"},
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": _text(
            "qwen3_5_moe_text", shared_expert_intermediate_size=16, **QWEN35, **ROUTED
        ),
        "vision_config": QWEN_TOWER | {"model_type": "qwen3_5_moe_vision"},
    },
    "gemma2": _text(
        "gemma2", head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
        layer_types=[SLIDE, FULL, SLIDE],
    ),
    "gemma3_text": _text("gemma3_text", **GEMMA3),
    "gemma3": {
        "model_type": "gemma3",
        "text_config": _text("gemma3_text", **GEMMA3),
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "mm_tokens_per_image": 4,
        "boi_token_index": 3,
        "eoi_token_index": 4,
        "image_token_index": 5,
    },
    "gemma3n_text": _text(
        "gemma3n_text", head_dim=8, sliding_window=WINDOW, laurel_rank=4,
        layer_types=[SLIDE, FULL, SLIDE, FULL], num_kv_shared_layers=2,
        hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCABULARY,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ) | {"num_hidden_layers": 4, "intermediate_size": [48] * 4},
    "gemma4_text": _text("gemma4_text", **GEMMA4, **SLIDING),
    "gemma4_text, keys shared by layers": _text(
        "gemma4_text", **GEMMA4, sliding_window=WINDOW, num_kv_shared_layers=2,
        layer_types=[SLIDE, FULL, SLIDE, FULL],
    ) | {"num_hidden_layers": 4},
    "gemma4": {
        "model_type": "gemma4",
        "text_config": _text("gemma4_text", **GEMMA4, **SLIDING),
        "vision_config": {
            "model_type": "gemma4_vision", **TOWER, "num_key_value_heads": 2, "head_dim": 8,
        },
        "audio_config": None,
    },
    "phi3": _text("phi3", sliding_window=None),
    "glm4": _text("glm4", head_dim=8),
    "glm4_moe": _text("glm4_moe", head_dim=8, first_k_dense_replace=2, **GROUPED),
    "glm4_moe_lite": _text("glm4_moe_lite", **(GROUPED | MLA | {"v_head_dim": 12})),
    "deepseek_v3": _text("deepseek_v3", first_k_dense_replace=1, **(GROUPED | MLA)),
    "granite": _text(
        "granite", logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=6.0,
        attention_multiplier=0.25,
    ),
    "granitemoehybrid": _text(
        "granitemoehybrid", shared_intermediate_size=32, layer_types=[LINEAR, LINEAR, FULL],
        logits_scaling=4.0, **LOCAL, **MAMBA2,
    ),
    "nemotron_h": _text(
        "nemotron_h", head_dim=8, layers_block_type=[LINEAR, "moe", FULL, "mlp"],
        ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=8,
        moe_shared_expert_intermediate_size=16, **GROUPED,
    ) | {"num_hidden_layers": 4},
    "lfm2": _text(
        "lfm2", layer_types=["conv", "conv", FULL], block_auto_adjust_ff_dim=False,
        block_ff_dim=48,
    ),
    "lfm2_moe": _text(
        "lfm2_moe", layer_types=["conv", "conv", FULL], num_dense_layers=1, **ROUTED
    ),
    "olmo3": _text("olmo3", **SLIDING),
    "smollm3": _text("smollm3", no_rope_layers=[1, 0, 1]),
    "exaone4": _text("exaone4", **SLIDING),
    "cohere2": _text("cohere2", logit_scale=0.25, rotary_pct=1.0, **SLIDING),
    "ernie4_5_moe": _text(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
        moe_num_shared_experts=1, moe_layer_start_index=1,
    ),
    "hunyuan_v1_dense": _text("hunyuan_v1_dense", head_dim=8),
    "minimax_m2": _text("minimax_m2", head_dim=8, **LOCAL),
    "mixtral": _text("mixtral", **LOCAL),
    "phimoe": _text("phimoe", router_jitter_noise=0.0, input_jitter_noise=0.0, **LOCAL),
    "llama4_text": _text(
        "llama4_text", head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8,
        no_rope_layers=[1, 1, 0], num_local_experts=4, num_experts_per_tok=1,
    ),
    "falcon_h1": _text("falcon_h1", mamba_d_ssm=64, mamba_n_groups=2, **MAMBA2),
    "jamba": _text(
        "jamba", num_experts=4, num_experts_per_tok=2, expert_layer_period=2,
        expert_layer_offset=1, attn_layer_period=3, attn_layer_offset=2, mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "mamba2": {
        "model_type": "mamba2", "vocab_size": VOCABULARY, "hidden_size": 32,
        "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2,
        "n_groups": 2, "chunk_size": 8, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt": _text("opt", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_positions": 256,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": _text("gpt_neox"),
    "stablelm": _text("stablelm"),
}  # fmt: skip

SMALL = {
    **SIDES,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "max_window_layers": 3,
    "query_pre_attn_scalar": 8,
    "original_max_position_embeddings": 64,
    "mm_tokens_per_image": 4,
    "boi_token_index": 3,
    "eoi_token_index": 4,
    "image_token_index": 5,
    "image_size": 16,
    "patch_size": 8,
}


def shrunk(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A shipped `config.json` with small numbers; what it holds, and what not, stays."""
    small: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            small[name] = shrunk(value)
        else:
            small[name] = SMALL.get(name, value) if value is not None else None
    if raw.get("model_type") == "gemma3_text":  # what the file leaves out is large otherwise
        small |= {name: SMALL[name] for name in ("vocab_size", "num_attention_heads", "head_dim")}
        small |= {"num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    if "kv_lora_rank" in raw:  # MLA has keys for each head of queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    if raw.get("model_type") == "siglip_vision_model":
        small |= TOWER
    return small


SHIPPED = {
    f"{name}, small": shrunk(row.config)
    for name, row in MODELS.items()
    if "layer_types" not in row.text_config  # a list of all layers; the types are in `TINY`
}


def write_model(folder: Path, sides: dict[str, Any]) -> None:
    """A random model as the hub has it: of a wrapper the whole, tower and all."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(**sides)
    auto = AutoModelForImageTextToText if "text_config" in sides else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 or key.endswith("correct_output_scale"):
                parameter.normal_(0, 0.1, generator=draw)
    model.save_pretrained(folder)
