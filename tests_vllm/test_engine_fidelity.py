"""Rollout fidelity with the real engine: right where it is right, and where it is wrong, wrong for the reason named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from grpo_autotune.engine.records import Fidelity
from grpo_autotune.probe.attach import Probe

Colocated = Callable[..., Any]
Rows = list[dict[str, Any]]

FAST = {"learning_rate": 0.02}
"""So fast that three steps move the log-probs by much more than rounding."""


def measured(trainer: Any) -> Fidelity:
    probe = Probe(trainer)
    trainer.train()
    found = probe.record().fidelity
    probe.detach()
    assert found is not None
    return found


def points(fidelity: Fidelity) -> dict[str, str]:
    return {cause.name: cause.points for cause in fidelity.causes}


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM runs a float32 checkpoint in bfloat16 unless it is told not to."""
    from trl.generation import vllm_generation

    engine = vllm_generation.LLM
    monkeypatch.setattr(vllm_generation, "LLM", lambda **keys: engine(**keys, dtype="float32"))


@pytest.mark.parametrize(("kind", "lora"), [("qwen3", True), ("llama", False)])
def test_text_is_faithful_before_and_after_optimizer_steps(
    colocated: Colocated, text_rows: Rows, kind: str, lora: bool
) -> None:
    found = measured(colocated(kind, text_rows, lora=lora, **FAST))
    assert found.ok and found.max_nats <= 1e-4 and found.text_nats is not None and found.text_nats <= 1e-4
    assert found.moved is True and found.updates_checked == 2
    assert found.trainer_moved_nats == pytest.approx(found.engine_moved_nats, rel=0.05)
    assert found.trainer_moved_nats > 1e-3
    assert {part.when for part in found.parts} == {"first", "later"}
    assert found.shift_nats is None and found.sampling == {} and found.dropped_of == "samples"


def test_an_engine_that_gets_no_weights_is_stale(colocated: Colocated, text_rows: Rows) -> None:
    trainer = colocated("qwen3", text_rows, **FAST)
    trainer.vllm_generation.sync_weights = lambda: None
    found = measured(trainer)
    assert not found.ok and found.cause == "stale weights" and found.moved is False
    assert points(found)["sampling parameters"] == points(found)["dtype"] == "no"
