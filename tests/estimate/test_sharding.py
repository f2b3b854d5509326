"""Bytes of shards, against the figures that the paper on ZeRO prints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.estimate.architectures import ARCHITECTURES
from grpo_autotune.estimate.memory import largest_layer_bytes, memory, weight_bytes
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.sharding import sent_bytes, shares_of
from grpo_autotune.predict.workload import Workload, workload
from grpo_autotune.records.probe import Sharding
from tests.knobs.test_knobs import config, machine
from tests.support.sample_records import demo_record, trainer_facts

SHAPE = ModelShape.from_config(ARCHITECTURES["qwen3-0.6b"].config)


def sharded(stage: int, ranks: int = 64, **changes: Any) -> Sharding:
    return Sharding(name=f"ZeRO-{stage}", ranks=ranks, parameters=1.0, optimizer=1.0, **changes)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_a_rank_holds_what_figure_1_of_the_paper_says(stage: int, gigabytes: float) -> None:
    """7.5 billion parameters on 64 ranks, in mixed precision: 2 + 2 + 12 bytes of each."""
    held = shares_of(sharded(stage), on_gpu=True)
    assert 7.5 * (2 * held.parameters + 2 * held.gradients + 12 * held.optimizer) == pytest.approx(gigabytes, abs=0.05)


def test_what_the_host_keeps_is_not_on_the_gpu() -> None:
    optimizer = sharded(2, offload_optimizer=True)
    assert shares_of(optimizer, on_gpu=True) == (1.0, 0.0, 0.0)
    assert shares_of(optimizer, on_gpu=False) == shares_of(sharded(2), on_gpu=False) == (1.0, 1 / 64, 1 / 64)
    both = sharded(3, offload_optimizer=True, offload_parameters=True)
    assert shares_of(both, on_gpu=True) == (0.0, 0.0, 0.0)


def load(sharding: Sharding | None, *, peft: bool = False, processes: int = 2, **grpo: Any) -> Workload:
    """One micro batch a step of a text model, fully trained or with an adapter, in bfloat16."""
    trained = 10_000_000 if peft else SHAPE.parameters
    trainer = trainer_facts(
        model_config_json={**ARCHITECTURES["qwen3-0.6b"].config, "dtype": "bfloat16"},
        parameters=SHAPE.parameters, trainable_parameters=trained, dtype="bfloat16", sharding=sharding,
        peft={"peft_type": "LORA", "r": 8} if peft else None, gradient_accumulation_steps=1, steps_per_generation=1,
        per_device_train_batch_size=8, beta=0.0, world_size=processes,
    )  # fmt: skip
    one: RunConfig = config(
        {"peft": {"r": 8} if peft else None}, per_device_train_batch_size=8, gradient_accumulation_steps=1, **grpo
    )
    return workload(one, one, demo_record(trainer=trainer, images=None), machine())


def test_stage_3_sends_half_as_much_again_as_data_parallelism() -> None:
    """Section 7: twice the parameters up to stage 2, three times in stage 3, for a step of one pass."""
    facts = replace(load(None).facts, old_policy=False, reference=False, passes=1)
    trained = facts.training.trainable * facts.training.trainable_bytes
    sent = {n: sent_bytes(sharded(n), facts, trained, 0.0)["collectives"] / (trained * 63 / 64) for n in range(4)}
    assert sent == pytest.approx({0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0})
    four = replace(facts, passes=4)
    sent = {n: sent_bytes(sharded(n), four, trained, 1.0)["collectives"] / (trained * 63 / 64) for n in (1, 2, 3)}
    assert sent == pytest.approx({1: 2.0, 2: 5.0, 3: 4 * 3 + 1})  # gradients of every pass; and for generation once


def test_an_adapter_on_shards_sends_frozen_weights_and_keeps_no_state_of_them() -> None:
    plain, one, three = (load(sharded(s, 2) if s else None, peft=True) for s in (0, 1, 3))
    held = {n: memory(SHAPE, one_load.facts, one_load.sizes) for n, one_load in ((0, plain), (1, one), (3, three))}
    assert held[1].weights == held[0].weights and held[3].weights == pytest.approx(held[0].weights / 2)
    assert held[1].moments == pytest.approx(10_000_000 * 12 / 2)
    assert held[3].gradients == pytest.approx(held[0].gradients / 2) and held[1].gradients == held[0].gradients
    assert held[3].activations == held[0].activations
    assert three.sent["collectives"] > 40 * one.sent["collectives"] > 0.0 and plain.sent == {}


def test_a_pass_over_shards_gathers_a_layer_and_generation_all() -> None:
    three = load(sharded(3, 2))
    parts, training = memory(SHAPE, three.facts, three.sizes), three.facts.training
    assert parts.gathered == 2 * largest_layer_bytes(SHAPE, training)
    assert parts.copies == pytest.approx(weight_bytes(SHAPE, training) / 2)  # the other rank's half
    by_token = load(sharded(3, 2), ds3_gather_for_generation=False)
    assert memory(SHAPE, by_token.facts, by_token.sizes).copies == 0.0
    assert by_token.sent["collectives"] > three.sent["collectives"]
    assert memory(SHAPE, load(sharded(2, 2)).facts, load(sharded(2, 2)).sizes).gathered == 0.0
