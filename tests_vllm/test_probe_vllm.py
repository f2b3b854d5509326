"""The probe on TRL's vLLM paths: the real engine (its CPU build) in this process, and a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.probe import ProbeRecord, StageRow
from tests.support.trainers import losses

Colocated = Callable[..., Any]
Rows = list[dict[str, Any]]

BFLOAT16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
"""vLLM runs a float32 checkpoint in bfloat16, and TRL 1.16 cannot tell it not to: like is compared with like."""


def probed(trainer: Any) -> tuple[ProbeRecord, dict[str, StageRow]]:
    probe = Probe(trainer)
    trainer.train()
    record = probe.record()
    probe.detach()
    for index, step_s in enumerate(record.timings.step_s):
        assert sum(row.per_step_s[index] for row in record.timings.stages) == pytest.approx(step_s, abs=1e-6)
    return record, {row.name: row for row in record.timings.stages}


def ran(row: StageRow) -> list[bool]:
    return [seconds > 0 for seconds in row.per_step_s]


@pytest.mark.parametrize(("kind", "lora"), [("qwen3", True), ("llama", False)])
def test_colocated_text(colocated: Colocated, text_rows: Rows, kind: str, lora: bool) -> None:
    record, stages = probed(colocated(kind, text_rows, lora=lora, beta=0.04, **BFLOAT16))
    for name in ("generation", "weight_sync", "policy_logprob", "reference_logprob", "backward", "optimizer"):
        assert ran(stages[name]) == [True, True], name
    assert all(seconds > 0 for seconds in stages["policy_logprob"].parts["old_policy"])
    assert all(seconds > 0 for seconds in stages["policy_logprob"].parts["training_forward"])
    assert ran(stages["engine"]) == [False, False]
    assert any("vllm" in seam for seam in stages["generation"].seams)
    assert record.tokens is not None and record.fidelity is not None
    assert record.fidelity.tokens == pytest.approx(record.tokens.completion_per_step * 3, abs=1)
    assert record.fidelity.ok
    assert 0 < record.fidelity.mean_nats <= record.fidelity.max_nats


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_colocated_images_are_reported_as_unfaithful(colocated: Colocated, picture_rows: Rows, kind: str) -> None:
    """TRL 1.16 hands vLLM placeholders that are expanded already, and vLLM expands them again (trl#6294)."""
    record, stages = probed(colocated(kind, picture_rows, **BFLOAT16))
    assert ran(stages["weight_sync"]) == [True, True]
    assert record.images is not None
    assert record.fidelity is not None and not record.fidelity.ok
    assert record.fidelity.mean_nats > record.fidelity.threshold_nats


def test_losses_are_the_same_to_the_last_digit(colocated: Colocated, text_rows: Rows) -> None:
    measured = colocated("qwen3", text_rows, max_steps=3)
    probed(measured)
    plain = colocated("qwen3", text_rows, max_steps=3)
    plain.train()
    assert losses(measured) == losses(plain)
    assert any(loss != 0.0 for loss in losses(plain))


def test_detach_leaves_the_engine_as_it_was(colocated: Colocated, text_rows: Rows) -> None:
    trainer = colocated("qwen3", text_rows)
    owners = [trainer, trainer.vllm_generation, trainer.vllm_generation.llm]
    before = [dict(vars(owner)) for owner in owners]
    probe = Probe(trainer)
    assert [dict(vars(owner)) for owner in owners] != before
    probe.detach()
    assert [dict(vars(owner)) for owner in owners] == before


def test_sleep_mode_has_an_engine_stage(colocated: Colocated, text_rows: Rows) -> None:
    """The CPU build refuses to start with sleep mode but takes its calls, so TRL is told only once the engine runs."""
    with pytest.raises(ValueError, match=r"Sleep mode is not supported"):
        colocated("qwen3", text_rows, vllm_enable_sleep_mode=True)
    trainer = colocated("qwen3", text_rows)
    trainer.vllm_generation.enable_sleep_mode = True
    trainer.vllm_generation._llm_weights_sleeping = False
    record, stages = probed(trainer)
    assert ran(stages["engine"]) == ran(stages["weight_sync"]) == ran(stages["generation"]) == [True, True]
    assert record.fidelity is not None
