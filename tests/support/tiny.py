"""Two-layer models of the real architectures, small enough to train a step in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_autotune.train.models.random_init import build_tokenizer, save_random_model

TEXTS = (
    "What is shown? Which digit is shown? How many are there? Answer with a number.",
    "<answer>0</answer> <answer>1</answer> <answer>2</answer> yes no left right red green blue",
    "system user assistant The answer is 12. You read digits. What is two plus three?",
)

TEXT: dict[str, Any] = {
    "vocab_size": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
}

VISION_IDS = {"image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "text_config": TEXT
        | {
            "model_type": "qwen2_5_vl_text",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        **VISION_IDS,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "text_config": TEXT
        | {
            "model_type": "qwen3_vl_text",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **VISION_IDS,
    },
    "qwen3": TEXT
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama": TEXT
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

VISION_KINDS = ("qwen2_5_vl", "qwen3_vl")


def tiny_model(kind: str, folder: Path) -> Path:
    """Save a random model of one of `CONFIGS` (float32, about 0.1 M parameters) as `folder / kind`; that path."""
    return save_random_model(CONFIGS[kind], folder / kind, tokenizer=build_tokenizer(TEXTS), min_pixels=28 * 28)
