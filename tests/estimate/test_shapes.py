"""Parameter counts from a config.json, held against `numel` of the real model."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.seams.torchvision_compat import ensure_torchvision

TEXT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
QWEN25_VISION = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 48,
    "fullatt_block_indexes": [1],
    "patch_size": 14,
    "window_size": 112,
}
QWEN3_VISION = {
    "model_type": "qwen3_vl_vision",
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TEXT},
    "llama-tied-biased": {"model_type": "llama", **TEXT}
    | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **TEXT, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **TEXT},
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 16},
    "qwen3-biased": {"model_type": "qwen3", **TEXT, "head_dim": 16, "attention_bias": True},
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": MROPE},
        "vision_config": QWEN25_VISION,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 8, "rope_parameters": MROPE},
        "vision_config": QWEN3_VISION,
    },
}


def real_model(config: dict[str, Any]) -> Any:
    """The transformers model of a config.json, with random weights."""
    ensure_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    built = AutoConfig.for_model(**config)
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return auto.from_config(built)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_real_models(name: str) -> None:
    config = CONFIGS[name]
    model = real_model(config)
    for source in (config, model.config.to_dict()):
        shape = ModelShape.from_config(source)
        visual = [p for n, p in model.named_parameters() if "visual." in n]
        assert shape.known
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert shape.vision_parameters == sum(p.numel() for p in visual)
        assert shape.text_parameters == shape.parameters - shape.vision_parameters


def test_flat_config_of_older_vision_models_reads_the_same() -> None:
    nested = CONFIGS["qwen2_5_vl"]
    flat = {**nested["text_config"], "model_type": "qwen2_5_vl", "vision_config": nested["vision_config"]}
    flat["tie_word_embeddings"] = True
    assert ModelShape.from_config(flat) == ModelShape.from_config(nested)


def test_unknown_decoder_is_read_plainly_and_says_so() -> None:
    shape = ModelShape.from_config({**TEXT, "model_type": "somebody_elses"})
    assert not shape.known
    assert shape.parameters == ModelShape.from_config({**TEXT, "model_type": "mistral"}).parameters


def test_keys_and_values_of_one_token() -> None:
    assert ModelShape.from_config(CONFIGS["qwen3"]).kv_bytes_per_token(2) == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "`hidden_size`"),
        ({"num_experts": 8}, "`num_experts`"),
        ({"vision_config": {"depth": 2}}, "vision tower of `llama`"),
    ],
)
def test_configs_without_formulas_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape.from_config(CONFIGS["llama"] | change)


def test_window_pairs_follow_the_models_own_windows() -> None:
    ensure_torchvision()
    import torch
    from transformers.vision_utils import get_vision_window_index

    vision = ModelShape.from_config(CONFIGS["qwen2_5_vl"]).vision
    assert vision is not None and vision.window == 4
    for rows, columns in [(4, 4), (16, 16), (18, 30), (10, 34)]:
        _, edges = get_vision_window_index(torch.tensor([[1, rows, columns]]), 2, 112, 14)
        assert vision.window_pairs(rows, columns) == int(edges.diff().square().sum())


def test_windowless_towers_attend_to_all() -> None:
    vision = ModelShape.from_config(CONFIGS["qwen3_vl"]).vision
    assert vision is not None and vision.window_pairs(4, 6) == 24**2
