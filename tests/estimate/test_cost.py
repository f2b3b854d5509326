"""Operation counts, held against torch's own counter on tiny real models run the way TRL runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_autotune.estimate.adapters import NO_ADAPTERS, adapter_sizes
from grpo_autotune.estimate.cost import (
    WorkFacts,
    facts_from_records,
    generation_work,
    limit_seconds,
    policy_parts,
    stage_work,
    training_batch,
)
from grpo_autotune.estimate.passes import Batch, Training, Work, attention_flops, backward, causal_pairs, forward
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.records.probe import ImageFacts, Spread, TokenFacts, TrainerFacts
from tests.estimate.test_shapes import CONFIGS, real_model

ROWS, TEXT_TOKENS, COMPLETION = 2, 40, 12
GRID = (10, 14)
IMAGE_TOKEN = 100
SPECIAL = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}


def counted(call: Any) -> tuple[Any, int]:
    """What `call` returns and the operations torch counted in it, with the three that its CPU table lacks."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    extra = {
        torch.ops.aten.addmm_: addmm_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=extra)
    with counter:
        result = call()
    return result, counter.get_total_flops()


def addmm_flops(total: Any, left: Any, right: Any, **_: Any) -> int:
    """Operations of `total += left @ right`, from the three shapes: TRL's head."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def attention_forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products over all pairs: torch's own formula for the flash kernel on CUDA."""
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products over all pairs: torch's own formula for the flash kernel on CUDA."""
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return int(sdpa_backward_flop_count(gradient, query, key, value))


def tiny(name: str) -> Any:
    """A model of a family in training mode with TRL's head."""
    from trl.trainer.utils import add_fused_lm_head

    config = CONFIGS[name]
    if "vision_config" in config:
        config = config | SPECIAL
    model = real_model(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model.train()


def inputs_of(name: str, grid: tuple[int, int] = GRID) -> tuple[dict[str, Any], Batch]:
    """Inputs as TRL's log-prob pass builds them, and the batch they are."""
    import torch

    ids = torch.randint(1, 90, (ROWS, TEXT_TOKENS))
    inputs: dict[str, Any] = {}
    images = 0
    if "vision_config" in CONFIGS[name]:
        merged = grid[0] * grid[1] // 4
        image = torch.tensor([102, *[IMAGE_TOKEN] * merged, 103]).expand(ROWS, -1)
        ids = torch.cat([image, ids], dim=1)
        patch = CONFIGS[name]["vision_config"]["patch_size"]
        inputs["pixel_values"] = torch.randn(ROWS * grid[0] * grid[1], 3 * 2 * patch**2)
        inputs["image_grid_thw"] = torch.tensor([[1, *grid]] * ROWS)
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        images = 1
    labels = ids.clone()
    labels[:, :-COMPLETION] = -100
    length = ids.shape[1]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}
    return inputs, Batch(rows=ROWS, length=length, scored=length - 1, images=images, grid=grid)


def training(shape: ModelShape, **changes: Any) -> Training:
    plain: dict[str, Any] = {
        "text_weights": True,
        "vision_weights": True,
        "adapters": NO_ADAPTERS,
        "checkpointing": False,
        "attention_backward": 2.5,
        "value_bytes": 4,
        "weight_bytes": 4,
        "trainable_bytes": 4,
        "trainable": shape.parameters,
    }
    return Training(**plain | changes)


def run_facts(shape: ModelShape, **changes: Any) -> WorkFacts:
    """A small run: two passes of four rows, groups of four, eight rows generated at a time."""
    plain: dict[str, Any] = {
        "micro_batch": 4,
        "passes": 2,
        "generation_rows": 8,
        "iterations": 1,
        "group": 4,
        "prompt_tokens": 20.0,
        "completion_tokens": 10.0,
        "longest_completion": 16.0,
        "padding_share": 0.0,
        "images": 0.0,
        "image_tokens": 0.0,
        "use_vllm": False,
        "old_policy": False,
        "reference": False,
        "compact_head": False,
        "training": training(shape),
    }
    return WorkFacts(**plain | changes)


def unmasked(shape: ModelShape, batch: Batch) -> float:
    """Operations that eager attention spends on the masked half of the pairs."""
    return attention_flops(shape, batch.rows, batch.length**2 - causal_pairs(batch.length))


def check(name: str, model: Any, how: Training, passes: float) -> None:
    """Count one forward and backward of `model` and compare; attention's backward costs `passes` of its forwards."""
    shape = ModelShape.from_config(CONFIGS[name])
    inputs, batch = inputs_of(name)
    output, forward_flops = counted(lambda: model(**inputs))
    _, backward_flops = counted(lambda: output.log_probs.sum().backward())
    extra = unmasked(shape, batch)
    assert forward(shape, batch, how).flops + extra == pytest.approx(forward_flops, rel=1e-9)
    assert backward(shape, batch, how).flops + passes * extra == pytest.approx(backward_flops, rel=0.002)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl"])
def test_full_fine_tuning(name: str, checkpointing: bool) -> None:
    model = tiny(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shape = ModelShape.from_config(CONFIGS[name])
    check(name, model, training(shape, checkpointing=checkpointing), 3.5 if checkpointing else 2.5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_frozen_vision_tower(name: str, checkpointing: bool) -> None:
    model = tiny(name)
    model.model.visual.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    shape = ModelShape.from_config(CONFIGS[name])
    how = training(shape, vision_weights=False, checkpointing=checkpointing)
    check(name, model, how, 3.5 if checkpointing else 2.5)


LORA = [
    ("qwen3", ["q_proj", "v_proj"]),
    ("qwen3", "all-linear"),
    ("qwen2_5_vl", "all-linear"),
    ("qwen3_vl", "all-linear"),
    ("qwen3_vl", ["q_proj", "v_proj"]),
    ("qwen2_5_vl", r".*language_model.*\.(q_proj|down_proj)"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "targets"), LORA)
def test_lora(name: str, targets: Any, checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(name), LoraConfig(r=2, target_modules=targets))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    shape = ModelShape.from_config(CONFIGS[name])
    sizes = adapter_sizes(shape, {"r": 2, "target_modules": targets})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.text + sizes.blocks + sizes.mergers == trained
    how = training(
        shape,
        text_weights=False,
        vision_weights=False,
        adapters=sizes,
        checkpointing=checkpointing,
        trainable=trained,
    )
    check(name, model, how, 3.5 if checkpointing else 2.5)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5_vl", "qwen3_vl"])
def test_generation(name: str) -> None:
    model = tiny(name).eval()
    shape = ModelShape.from_config(CONFIGS[name])
    inputs, batch = inputs_of(name, grid=(12, 12))
    for key in ("labels", "fused_lm_head"):
        inputs.pop(key)
    steps = COMPLETION
    _, flops = counted(lambda: model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False))
    facts = run_facts(
        shape,
        micro_batch=ROWS,
        passes=1,
        generation_rows=ROWS,
        prompt_tokens=batch.length,
        completion_tokens=steps,
        longest_completion=steps,
        images=batch.images,
        image_tokens=36,
    )
    assert generation_work(shape, facts).flops + unmasked(shape, batch) == pytest.approx(flops, rel=1e-9)


def test_disabled_adapters_cost_nothing() -> None:
    shape = ModelShape.from_config(CONFIGS["qwen3"])
    how = training(shape, adapters=adapter_sizes(shape, {"r": 4, "target_modules": "all-linear"}))
    batch = Batch(rows=2, length=8, scored=3)
    with_lora, without = forward(shape, batch, how), forward(shape, batch, how, adapters=False)
    assert with_lora.flops - without.flops == 2 * how.adapters.text * 16


def test_work_adds_and_scales() -> None:
    work = (Work(((3.0, 5.0),)) + Work(((1.0, 1.0),))) * 2
    assert (work.flops, work.bytes, work.phases) == (8.0, 12.0, ((6.0, 10.0), (2.0, 2.0)))


QWEN3 = ModelShape.from_config(CONFIGS["qwen3"])


def test_stages_follow_the_passes_that_run() -> None:
    lean = stage_work(QWEN3, run_facts(QWEN3))
    assert set(lean) == {"generation", "policy_logprob", "backward", "optimizer"}
    full = stage_work(QWEN3, run_facts(QWEN3, old_policy=True, reference=True))
    one = forward(QWEN3, training_batch(QWEN3, run_facts(QWEN3)), training(QWEN3))
    assert lean["policy_logprob"].flops == pytest.approx(2 * one.flops)
    assert full["policy_logprob"].flops == pytest.approx(4 * one.flops)
    assert full["reference_logprob"].flops == pytest.approx(2 * one.flops)
    assert full["backward"] == lean["backward"]


def test_sequences_trained_twice_are_generated_and_scored_half_as_often() -> None:
    once = run_facts(QWEN3, old_policy=True, reference=True)
    twice = replace(once, iterations=2)
    before, after = stage_work(QWEN3, once), stage_work(QWEN3, twice)
    for stage in ("generation", "reference_logprob"):
        assert after[stage].flops == pytest.approx(before[stage].flops / 2)
    assert after["backward"] == before["backward"]
    parts = policy_parts(QWEN3, twice)
    assert parts["old_policy"].flops == pytest.approx(parts["training_forward"].flops / 2)


def test_optimizer_moves_seven_values_a_parameter() -> None:
    facts = run_facts(QWEN3, training=training(QWEN3, trainable=1000.0, trainable_bytes=4))
    assert stage_work(QWEN3, facts)["optimizer"].bytes == 28_000


def test_padding_is_computed_and_the_compact_head_is_not() -> None:
    plain, padded = run_facts(QWEN3), run_facts(QWEN3, padding_share=0.25)
    assert training_batch(QWEN3, padded).length == 40
    assert training_batch(QWEN3, plain).scored == 29
    compact = run_facts(QWEN3, compact_head=True)
    saved = (
        policy_parts(QWEN3, plain)["training_forward"].flops - policy_parts(QWEN3, compact)["training_forward"].flops
    )
    assert saved == 2 * QWEN3.head_weights * (29 - 10) * 8


def test_decoding_reads_the_weights_at_every_token_and_the_cache_grows() -> None:
    facts = run_facts(QWEN3)
    _, decode = generation_work(QWEN3, facts).phases[-2:]
    weights = (QWEN3.layers * QWEN3.layer_parameters + QWEN3.head_weights) * 4
    cached = sum(20 + step for step in range(1, 16)) * 8
    assert decode[1] == 15 * weights + cached * QWEN3.kv_bytes_per_token(4)
    packed = run_facts(QWEN3, training=training(QWEN3, weight_bytes=0.5))
    assert generation_work(QWEN3, packed).bytes < generation_work(QWEN3, facts).bytes


def test_vllm_drops_finished_rows_and_prefills_a_group_once() -> None:
    facts = run_facts(QWEN3, longest_completion=10.0)
    engine = replace(facts, use_vllm=True)
    prefill = generation_work(QWEN3, facts).phases[0][0]
    assert generation_work(QWEN3, engine).phases[0][0] == pytest.approx(prefill / 4)
    ragged = replace(engine, longest_completion=40.0)
    assert generation_work(QWEN3, ragged).flops == pytest.approx(generation_work(QWEN3, engine).flops)
    assert generation_work(QWEN3, replace(facts, longest_completion=40.0)).flops > 2 * prefill


def test_limit_is_the_slower_of_both_in_each_phase() -> None:
    work = Work(((100.0, 1.0), (1.0, 100.0)))
    assert limit_seconds(work, matrix_flops_s=10.0, memory_bytes_s=20.0) == 10.0 + 5.0


def spread(mean: float, largest: float) -> dict[str, float]:
    return {"mean": mean, "p50": mean, "p90": largest, "p99": largest, "max": largest}


def records(**changes: Any) -> tuple[TrainerFacts, TokenFacts, ImageFacts]:
    """A probe's trainer, token and image facts."""
    trainer = TrainerFacts(
        **{
            "model_config_json": CONFIGS["qwen2_5_vl"],
            "model_class": "Model",
            "parameters": 10,
            "trainable_parameters": 7,
            "peft": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
            "dtype": "bfloat16",
            "device": "cuda:0",
            "attn_implementation": "sdpa",
            "gradient_checkpointing": True,
            "num_generations": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "steps_per_generation": 4,
            "num_iterations": 1,
            "generation_batch_size": 8,
            "max_completion_length": 32,
            "beta": 0.04,
            "loss_type": "dapo",
            "has_ref_model": False,
            "use_vllm": False,
            "vllm_mode": None,
            "dataloader_num_workers": 0,
            "world_size": 1,
            "reward_weights": [1.0],
        }
        | changes
    )
    tokens = TokenFacts(
        prompt=Spread(**spread(50.0, 60.0)),
        completion=Spread(**spread(20.0, 32.0)),
        prompt_per_step=400.0,
        completion_per_step=160.0,
        padding_share=0.3,
        truncated_share=0.1,
        groups=2,
        dead_groups=0,
        pass_rates=[0.5, 0.5],
        reward_mean=0.5,
    )
    images = ImageFacts(
        pixels=Spread(**spread(1e4, 1e4)),
        per_prompt=1.0,
        tokens=Spread(**spread(36.0, 40.0)),
        tokens_at={},
        distinct_per_step=2.0,
        decodes_per_image=1.0,
        processings_per_image=2.0,
    )
    return trainer, tokens, images


def test_facts_from_a_probes_records() -> None:
    shape = ModelShape.from_config(CONFIGS["qwen2_5_vl"])
    facts = facts_from_records(shape, *records())
    assert (facts.generation_rows, facts.row_tokens, facts.longest_completion) == (8, pytest.approx(100.0), 32.0)
    assert (facts.old_policy, facts.reference, facts.compact_head) == (False, True, True)
    assert (facts.training.value_bytes, facts.training.trainable_bytes, facts.training.text_weights) == (2, 4, False)
    assert set(stage_work(shape, facts)) >= {"generation", "reference_logprob"}
    assert facts_from_records(shape, *records(steps_per_generation=8)).old_policy
    assert facts_from_records(shape, *records(use_vllm=True)).old_policy
    assert not facts_from_records(shape, *records(use_vllm=True), old_policy=False).old_policy


def test_trained_parts_are_told_by_their_number() -> None:
    shape = ModelShape.from_config(CONFIGS["qwen2_5_vl"])
    whole = records(peft=None, trainable_parameters=shape.parameters)
    frozen = records(peft=None, trainable_parameters=shape.text_parameters)
    assert facts_from_records(shape, *whole).training.vision_weights
    assert not facts_from_records(shape, *frozen).training.vision_weights
    autocast = records(peft=None, model_config_json=CONFIGS["qwen2_5_vl"] | {"dtype": "float32"})
    kept = facts_from_records(shape, *autocast).training
    assert (kept.value_bytes, kept.weight_bytes, kept.trainable_bytes) == (2, 4, 4)
    packed = CONFIGS["qwen2_5_vl"] | {"quantization_config": {"load_in_4bit": True}}
    assert facts_from_records(shape, *records(model_config_json=packed)).training.weight_bytes == 0.5
