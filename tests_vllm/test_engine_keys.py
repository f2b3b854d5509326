"""Keys reach the engine's own configuration, and its processor is the trainer's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from grpo_autotune.errors import ConfigError
from grpo_autotune.rollout.colocate.processors import compare_pixels, compare_settings, settings, size_limit
from grpo_autotune.rollout.parts import engine_of
from grpo_autotune.train.trainer import build_trainer
from tests.support.exactness import set_to_train
from tests.support.training import picture_config
from tests_vllm.conftest import LARGEST_IMAGE, TRL_SETS
from tests_vllm.engines import NATS, Rows, scored, unlocked

Colocated = Callable[..., Any]

KEYS: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "max_num_seqs": 3,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "gpu_memory_utilization": 0.4,
    "max_model_len": 192,
    "tensor_parallel_size": 1,
    "mm_processor_kwargs": {"max_pixels": LARGEST_IMAGE},
    "limit_mm_per_prompt": {"image": {"count": 2, "width": 56, "height": 56}, "video": 0},
    "block_size": 32,
}


def test_keys_reach_the_engine(colocated: Colocated, picture_rows: Rows) -> None:
    trainer = unlocked(colocated, "qwen3_vl", picture_rows, KEYS)
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    model, images = config.model_config, config.model_config.multimodal_config
    seen = {
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "enable_prefix_caching": config.cache_config.enable_prefix_caching,
        "enable_chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "enforce_eager": model.enforce_eager,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "max_model_len": model.max_model_len,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "mm_processor_kwargs": images.mm_processor_kwargs,
        "block_size": config.cache_config.block_size,
    }
    assert seen == {key: KEYS[key] for key in seen}
    limit = images.limit_per_prompt["image"]
    assert (limit.count, limit.width, limit.height) == (2, 56, 56)
    assert engine_of(trainer.vllm_generation).llm_keys["max_num_seqs"] == 3
    assert scored(trainer)[0]["completion_ids"].shape[0] == 4


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_largest_image_sizes_the_engine(colocated: Colocated, picture_rows: Rows, kind: str) -> None:
    trainer = unlocked(colocated, kind, picture_rows, {})
    assert engine_of(trainer.vllm_generation).options.image_sizes == {(56, 56)}
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    tokens = {"qwen2_5_vl": (56 // 28) ** 2, "qwen3_vl": (64 // 32) ** 2}[kind]
    assert runner.mm_budget.mm_max_toks_per_item == {"image": tokens}
    assert scored(trainer)[1].max() <= NATS


def test_a_processor_changed_in_memory_stops(
    colocated: Colocated, served: Callable[[str], Path], picture_rows: Rows
) -> None:
    processor = AutoProcessor.from_pretrained(served("qwen3_vl"), padding_side="left")
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 1024}
    with pytest.raises(ConfigError, match=r"^vllm.mm_processor_kwargs: .* size .*1024.*12544.*data.image_size"):
        unlocked(colocated, "qwen3_vl", picture_rows, {}, processor=processor)


def test_what_of_two_processors_must_agree(served: Callable[[str], Path], picture_rows: Rows) -> None:
    saved = AutoProcessor.from_pretrained(served("qwen2_5_vl")).image_processor
    other = AutoProcessor.from_pretrained(served("qwen2_5_vl")).image_processor
    compare_settings(settings(saved), settings(other))
    compare_pixels(saved, other, {}, picture_rows[0]["image"])
    compare_settings(settings(saved), settings(other, {"max_pixels": LARGEST_IMAGE}))
    with pytest.raises(ConfigError, match="size"):
        compare_settings(settings(saved), settings(other, {"max_pixels": 1568}))
    with pytest.raises(ConfigError, match="values of one image"):
        compare_pixels(saved, other, {"size": {"shortest_edge": 784, "longest_edge": 1568}}, picture_rows[0]["image"])
    other.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(ConfigError, match=r"image_mean .* Set image_mean there"):
        compare_settings(settings(saved), settings(other))
    with pytest.raises(ConfigError, match=r"values .* apart of one image"):
        compare_pixels(saved, other, {}, picture_rows[0]["image"])


def test_the_limit_is_the_largest_resized_image(served: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(served("qwen2_5_vl")).image_processor
    assert size_limit(processor, {(56, 56), (60, 30)}) == {"shortest_edge": 784, "longest_edge": 56 * 56}
    assert size_limit(processor, {(70, 70)}) == {"shortest_edge": 784, "longest_edge": 56 * 56}
    assert size_limit(processor, {(71, 71)}) == {"shortest_edge": 784, "longest_edge": 84 * 84}
    assert size_limit(processor, {(4000, 3000)}) == {"shortest_edge": 784, "longest_edge": 84 * 112}
    assert size_limit(processor, {(4000, 4000)}) is None


def test_resized_data_are_the_same_pixels_for_both(
    served: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Through the configuration: images of 84 x 56 become 64 wide, and the engine is sized for them."""
    settings = {"use_vllm": True, "use_cpu": True, "bf16": False, "temperature": 1.0}
    sections = {
        "data": {"image_size": 64},
        "vllm": {"max_model_len": 256, "max_num_seqs": 5, "weight_sync": "merged"},
        "rewards": [{"name": "length", "params": {"max_tokens": 8, "target_tokens": 3}}],
    }
    trainer = build_trainer(picture_config(served("qwen3_vl"), tmp_path, sections, **settings))
    request.addfinalizer(lambda: [os.environ.pop(name, None) for name in TRL_SETS])
    request.addfinalizer(trainer.vllm_generation.llm.llm_engine.engine_core.shutdown)
    engine = engine_of(trainer.vllm_generation)
    assert engine.llm_keys["max_num_seqs"] == 5 and engine.options.image_sizes == {(56, 56), (64, 43)}
    batch, apart = scored(set_to_train(trainer))
    assert batch["image_grid_thw"].prod(-1).max() * 16 * 16 <= 64 * 64
    assert apart.max() <= NATS
