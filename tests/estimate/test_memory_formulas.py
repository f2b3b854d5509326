"""Memory formulas, held against the live tensors of tiny real models run the way TRL runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_autotune.estimate.adapters import adapter_sizes
from grpo_autotune.estimate.architectures import ARCHITECTURES
from grpo_autotune.estimate.engine import engine_need
from grpo_autotune.estimate.memory import (
    BACKWARD_TILES,
    DECODED_BYTES,
    TILE_TOKENS,
    TILE_VOCAB,
    Sizes,
    head_bytes,
    kept_bytes,
    memory,
    weight_bytes,
)
from grpo_autotune.estimate.passes import Batch, Training
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.vision_shapes import image_tokens
from tests.estimate.test_cost import inputs_of, run_facts, tiny, training
from tests.estimate.test_shapes import CONFIGS
from tests.support.live_bytes import LiveBytes

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    ("qwen3", TEXT_TARGETS, False, "sdpa"),
    ("qwen3", TEXT_TARGETS, True, "sdpa"),
    ("qwen3", TEXT_TARGETS, False, "eager"),
    ("qwen3_vl", TEXT_TARGETS, False, "sdpa"),
    ("qwen3_vl", TEXT_TARGETS, True, "eager"),
    ("qwen3_vl", "all-linear", False, "sdpa"),
    ("qwen2_5_vl", "all-linear", False, "eager"),
    ("qwen2_5_vl", None, True, "sdpa"),
    ("qwen3_vl", None, False, "sdpa"),
    ("llama", None, False, "sdpa"),
    ("llama", None, True, "sdpa"),
]
"""Family, LoRA's targets (null: all weights are trained), checkpointing, attention kernel."""


def prepared(name: str, targets: Any, checkpointing: bool, kernel: str) -> tuple[Any, Training]:
    """A tiny model as it is trained, and what is told of it."""
    from peft import LoraConfig, get_peft_model

    shape, model = ModelShape.from_config(CONFIGS[name]), tiny(name)
    model.set_attn_implementation(kernel)
    if targets is None:
        how = training(shape, checkpointing=checkpointing)
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        how = training(
            shape,
            text_weights=False,
            vision_weights=False,
            adapters=adapter_sizes(shape, {"r": 2, "target_modules": targets}),
            checkpointing=checkpointing,
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )
        if checkpointing:
            model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, how


@pytest.mark.parametrize(("name", "targets", "checkpointing", "kernel"), CASES)
def test_a_pass_keeps_what_the_formula_says(
    name: str, targets: Any, checkpointing: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.utils as trl_utils

    shape = ModelShape.from_config(CONFIGS[name])
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", shape.vocab)  # its tile is allocated whole otherwise
    model, how = prepared(name, targets, checkpointing, kernel)
    inputs, batch = inputs_of(name)
    facts = run_facts(
        shape,
        micro_batch=batch.rows,
        passes=1,
        prompt_tokens=batch.length - 12.0,
        completion_tokens=12.0,
        images=batch.images,
        training=how,
    )
    tokens = batch.grid[0] * batch.grid[1] / 4
    found = memory(shape, facts, Sizes(batch.length - 12.0, 12.0, tokens, eager=kernel == "eager"))
    with LiveBytes() as live:
        output = model(**inputs)
        kept = live.now
        output.log_probs.sum().backward()
    slack = 0.3 if checkpointing else 0.12  # beside the layers' inputs, masks and positions count in a model this small
    assert kept_bytes(shape, batch, how, eager=kernel == "eager") == pytest.approx(kept, rel=slack)
    assert found.training == pytest.approx(live.most, rel=0.25)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl", "llama"])
def test_weights_and_cache_are_the_models(name: str) -> None:
    import torch

    model, shape = tiny(name).eval(), ModelShape.from_config(CONFIGS[name])
    assert weight_bytes(shape, training(shape)) == sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        cache = model(input_ids=torch.randint(1, 90, (2, 30)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.kv_bytes_per_token(4) * 2 * 30 == held


def test_tiles_are_those_of_trl() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (TILE_TOKENS, TILE_VOCAB) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


def test_logits_of_a_long_batch_are_never_whole() -> None:
    shape = ModelShape.from_config(ARCHITECTURES["qwen3-0.6b"].config)
    half = training(shape, value_bytes=2, text_weights=False)
    long = head_bytes(shape, 64 * 2048, half, fused=True, tiles=BACKWARD_TILES)
    assert long < 0.05 * 64 * 2048 * shape.vocab * 2


@pytest.mark.parametrize(
    "size", [(96, 96), (300, 500), (40, 2000), (17, 17), (2500, 3000)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_tokens_of_an_image_are_the_processors(size: tuple[int, int]) -> None:
    from grpo_autotune.seams.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    bounds = (64 * 32 * 32, 4096 * 32 * 32)
    height, width = smart_resize(*size, factor=32, min_pixels=bounds[0], max_pixels=bounds[1])
    assert image_tokens(*size, 32, bounds) == height * width // 32**2


def large(**changes: Any) -> Any:
    """Qwen3-VL 2B with LoRA in bfloat16: eight rows of a 1024-token image, 256 new tokens."""
    shape = ModelShape.from_config(ARCHITECTURES["qwen3-vl-2b"].config)
    peft = {"r": 32, "target_modules": TEXT_TARGETS}
    how = training(
        shape,
        text_weights=False,
        vision_weights=False,
        adapters=adapter_sizes(shape, peft),
        value_bytes=2,
        weight_bytes=changes.pop("weight_bytes", 2),
        checkpointing=changes.pop("checkpointing", True),
        trainable=float(adapter_sizes(shape, peft).text),
    )
    sizes = {"prompt": 1100.0, "completion": 256.0, "image_tokens": 1024.0, "fused": True}
    chosen = {name: changes.pop(name) for name in list(changes) if name in Sizes.__dataclass_fields__}
    facts = run_facts(shape, images=1.0, image_tokens=1024.0, training=how, compact_head=True, **changes)
    return memory(shape, facts, Sizes(**sizes | chosen))


def test_a_real_model_needs_what_people_see() -> None:
    """Qwen3-VL 2B: 4.3 GB of weights in bfloat16; LoRA with checkpointing fits a small card, without it does not."""
    with_it, without = large(), large(checkpointing=False)
    assert with_it.weights == pytest.approx(4.3e9, rel=0.05)
    assert with_it.peak < 16e9 < without.peak
    assert large(weight_bytes=0.5).weights < 0.6 * with_it.weights


def test_every_setting_pushes_the_way_it_should() -> None:
    plain = large()
    assert large(micro_batch=8).training == pytest.approx(2 * plain.training, rel=0.35)
    assert large(checkpointing=False).activations > 5 * plain.activations
    assert large(checkpointing=False, eager=True).activations > 2 * large(checkpointing=False).activations
    assert large(generation_rows=16).cache == 2 * plain.cache
    assert large(use_vllm=True).cache == 0.0
    assert large(loaded_pixels=1e9).phases["training"] == plain.phases["training"] + DECODED_BYTES * 1e9
    assert large(reference_model=True).weights > 1.9 * plain.weights
    assert large(moments_bytes=2.0).moments == plain.moments / 4


def test_a_sleeping_engine_is_there_in_generation_only() -> None:
    awake = large(use_vllm=True, engine_bytes=30e9)
    asleep = replace(awake, engine_sleeps=True)
    assert awake.phases["training"] - asleep.phases["training"] == 30e9
    assert awake.phases["generation"] == asleep.phases["generation"]


def test_an_engine_holds_weights_and_the_rows_that_fit() -> None:
    """Qwen3-VL 2B in half precision: 4.3 GB, and 28 layers x 8 heads x 128 x 2 numbers a token."""
    shape = ModelShape.from_config(ARCHITECTURES["qwen3-vl-2b"].config)
    need = engine_need(shape, longest=4096.0, row=1356.0)
    assert need.weights == pytest.approx(4.3e9, rel=0.05)
    assert need.row == 1356 * 28 * 8 * 128 * 2 * 2 and need.request == pytest.approx(need.row * 4096 / 1356)
    assert need.least == need.weights + need.activations + need.request
    assert engine_need(shape, longest=4096.0, row=1356.0, batched_tokens=8192).activations > 1.5 * need.activations
    eight = engine_need(shape, longest=4096.0, row=1356.0, weight_bytes=1.0, cache_bytes=1.0)
    assert (eight.weights, eight.row) == (need.weights / 2, need.row / 2)
    halves = engine_need(shape, longest=4096.0, row=1356.0, tensor_parallel=2)
    assert (halves.weights, halves.row) == (need.weights / 2, need.row / 2)


def test_memory_of_a_text_model_has_no_pixels() -> None:
    shape = ModelShape.from_config(ARCHITECTURES["qwen3-0.6b"].config)
    found = memory(shape, run_facts(shape, training=training(shape)), Sizes(100.0, 50.0, 0.0))
    assert found.pixels == found.images == 0.0
    assert Batch(1, 1, 1).patches == 0
