"""Shapes of real models as a table: their config.json, where it stands, and how large the model is published to be.

`model.random_init` takes these names; the shapes are enough to measure a model before downloading it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_autotune.errors import ConfigError, nearest_hint


@dataclass(frozen=True)
class Architecture:
    """One real model."""

    config: Mapping[str, Any]  # its config.json (in the nested form that transformers 5 writes)
    source: str  # URL of that file
    published_parameters: float  # parameters in billions as the model's page gives them, shared embeddings counted once


def _text(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Language-model keys that all rows have; sizes in channels, `layers` and heads in numbers."""
    return {
        "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True, "bos_token_id": 151643,
        "eos_token_id": 151645, **more,
    }  # fmt: skip


def _vision_model(model_type: str, class_name: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": model_type, "architectures": [class_name], "tie_word_embeddings": text["tie_word_embeddings"],
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "text_config": text, "vision_config": vision,
    }  # fmt: skip


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    more = {"head_dim": 128, "attention_bias": False, "use_sliding_window": False, "max_position_embeddings": 40960}
    return _text(hidden, mlp, layers, heads, 8, **more) | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    }  # fmt: skip


def _qwen3_vl(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool, large_tower: bool) -> dict[str, Any]:
    depth, channels, vision_mlp, taps = (27, 1152, 4304, [8, 16, 24]) if large_tower else (24, 1024, 4096, [5, 11, 17])
    more = {"head_dim": 128, "attention_bias": False, "max_position_embeddings": 262144}
    text = _text(hidden, mlp, layers, heads, 8, **more) | {
        "model_type": "qwen3_vl_text", "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000000, "mrope_interleaved": True, "mrope_section": [24, 20, 20],
        },
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl", "depth": depth, "hidden_size": channels, "intermediate_size": vision_mlp,
        "num_heads": 16, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": taps, "initializer_range": 0.02,
    }  # fmt: skip
    return _vision_model("qwen3_vl", "Qwen3VLForConditionalGeneration", text, vision)


def _qwen2_5_vl(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, *, vocab: int, tied: bool
) -> dict[str, Any]:
    text = _text(hidden, mlp, layers, heads, kv_heads) | {
        "vocab_size": vocab, "model_type": "qwen2_5_vl_text", "tie_word_embeddings": tied,
        "max_position_embeddings": 128000, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "hidden_act": "silu", "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 2, "window_size": 112, "out_hidden_size": hidden,
        "fullatt_block_indexes": [7, 15, 23, 31], "initializer_range": 0.02,
    }  # fmt: skip
    return _vision_model("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", text, vision)


def _row(repository: str, published_parameters: float, config: dict[str, Any]) -> Architecture:
    source = f"https://huggingface.co/Qwen/{repository}/blob/main/config.json"
    return Architecture(config=config, source=source, published_parameters=published_parameters)


ARCHITECTURES: dict[str, Architecture] = {
    "qwen2.5-vl-3b": _row("Qwen2.5-VL-3B-Instruct", 3.75, _qwen2_5_vl(2048, 11008, 36, 16, 2, vocab=151936, tied=True)),
    "qwen2.5-vl-7b": _row(
        "Qwen2.5-VL-7B-Instruct", 8.29, _qwen2_5_vl(3584, 18944, 28, 28, 4, vocab=152064, tied=False)
    ),
    "qwen3-vl-2b": _row("Qwen3-VL-2B-Instruct", 2.13, _qwen3_vl(2048, 6144, 28, 16, tied=True, large_tower=False)),
    "qwen3-vl-4b": _row("Qwen3-VL-4B-Instruct", 4.44, _qwen3_vl(2560, 9728, 36, 32, tied=True, large_tower=False)),
    "qwen3-vl-8b": _row("Qwen3-VL-8B-Instruct", 8.77, _qwen3_vl(4096, 12288, 36, 32, tied=False, large_tower=True)),
    "qwen3-0.6b": _row("Qwen3-0.6B", 0.6, _qwen3(1024, 3072, 28, 16, tied=True)),
    "qwen3-1.7b": _row("Qwen3-1.7B", 1.72, _qwen3(2048, 6144, 28, 16, tied=True)),
    "qwen3-4b": _row("Qwen3-4B", 4.02, _qwen3(2560, 9728, 36, 32, tied=True)),
    "qwen3-8b": _row("Qwen3-8B", 8.19, _qwen3(4096, 12288, 36, 32, tied=False)),
}


def architecture(name: str) -> Architecture:
    """The row of that name; ConfigError, which lists the names, where there is none."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    fix = f"{nearest_hint(name.lower(), ARCHITECTURES)} Known: {', '.join(ARCHITECTURES)}."
    raise ConfigError(f"unknown architecture {name!r}", where="model.random_init", fix=fix)
