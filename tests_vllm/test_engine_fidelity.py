"""Rollout fidelity with the real engine: right where it is right, and where it is wrong, wrong for the reason named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_autotune import unlock_vllm
from grpo_autotune.probe.probe import Probe
from grpo_autotune.records.rollout import Fidelity
from grpo_autotune.rollout.fidelity.meter import FidelityMeter
from grpo_autotune.rollout.sync import sync
from tests.support.exactness import generation, set_to_train

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


@pytest.fixture
def merged() -> Iterator[None]:
    with unlock_vllm(weight_sync="merged") as unlocking:
        yield
        unlocking.remove()


def points(fidelity: Fidelity) -> dict[str, str]:
    return {cause.name: cause.points for cause in fidelity.causes}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own engine, which runs a float32 checkpoint in bfloat16 unless it is told not to."""
    from trl.generation import vllm_generation

    engine = vllm_generation.LLM
    monkeypatch.setattr(vllm_generation, "LLM", lambda **keys: engine(**keys, dtype="float32"))


@pytest.fixture
def unlocked() -> Iterator[None]:
    with unlock_vllm() as unlocking:
        yield
        unlocking.remove()


@pytest.mark.usefixtures("unlocked")
@pytest.mark.parametrize(
    ("kind", "lora"), [("qwen3", True), ("llama", False), ("qwen3_vl", True), ("qwen2_5_vl", True)]
)
def test_faithful_before_and_after_optimizer_steps(
    colocated: Colocated, text_rows: Rows, picture_rows: Rows, kind: str, lora: bool
) -> None:
    rows = picture_rows if "vl" in kind else text_rows
    found = measured(colocated(kind, rows, lora=lora, **FAST))
    assert {part.rows for part in found.parts} == {"image" if "vl" in kind else "text"}
    assert found.ok and found.max_nats <= 1e-4 and found.text_nats is not None and found.text_nats <= 1e-4
    assert found.moved is True and found.updates_checked == 2
    assert found.trainer_moved_nats == pytest.approx(found.engine_moved_nats, rel=0.05)
    assert found.trainer_moved_nats > 1e-3
    assert {part.when for part in found.parts} == {"first", "later"}
    assert found.shift_nats is None and found.sampling == {} and found.dropped_of == "samples"


@pytest.mark.usefixtures("unlocked")
def test_an_engine_that_gets_no_weights_is_stale(colocated: Colocated, text_rows: Rows) -> None:
    trainer = colocated("qwen3", text_rows, **FAST)
    trainer.vllm_generation.sync_weights = lambda: None
    found = measured(trainer)
    assert not found.ok and found.cause == "stale weights" and found.moved is False
    assert points(found)["sampling parameters"] == points(found)["dtype"] == "no"


@pytest.mark.usefixtures("merged")
def test_embeddings_of_older_weights_are_named(
    colocated: Colocated, picture_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL 1.16 leaves the encoder cache: the fourth step comes back to images of the first two."""
    monkeypatch.setattr(sync, "changes_images", lambda model, pushed: False)
    found = measured(colocated("qwen3_vl", picture_rows, lora=False, max_steps=4, learning_rate=2e-3))
    assert not found.ok and found.cause == "stale caches", found
    assert points(found)["stale weights"] == points(found)["placeholders"] == points(found)["processor"] == "no"


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_placeholders_that_are_expanded_twice_are_named(colocated: Colocated, picture_rows: Rows, kind: str) -> None:
    """What TRL 1.16 does (trl#6294)."""
    found = measured(colocated(kind, picture_rows, **FAST))
    assert not found.ok and found.cause == "placeholders"
    assert {name for name, told in points(found).items() if told == "yes"} == {"placeholders"}
    assert points(found)["stale weights"] == points(found)["dtype"] == "no"
    assert found.text_nats is not None and found.text_nats <= 1e-4 and found.moved is True


@pytest.mark.usefixtures("plain")
def test_truncated_sampling_is_compared_like_with_like(colocated: Colocated, text_rows: Rows) -> None:
    found = measured(colocated("qwen3", text_rows, top_p=0.9, **FAST))
    assert found.ok and found.max_nats <= 1e-4 and found.cause is None
    assert found.sampling == {"top_p": pytest.approx(0.9)}
    assert found.shift_nats == pytest.approx(0.105, abs=0.02)


PARAMETERS: list[dict[str, Any]] = [
    {"top_k": 50},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"generation_kwargs": {"presence_penalty": 0.8, "frequency_penalty": 0.4}},
    {"top_k": 80, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
]


@pytest.mark.usefixtures("plain")
def test_every_parameter_is_computed_as_vllm_does(colocated: Colocated, text_rows: Rows) -> None:
    trainer = set_to_train(colocated("qwen3", text_rows, temperature=0.7, max_completion_length=16))
    for given in PARAMETERS:
        plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "generation_kwargs": {}}
        for name, value in (plain | given).items():
            setattr(trainer.vllm_generation, name, value)
            setattr(trainer.args, name, value)
        meter = FidelityMeter(trainer)
        handles = meter.install()
        meter.see(generation(trainer))
        for handle in handles:
            handle.remove()
        found = meter.facts()
        assert found is not None and found.ok and found.max_nats <= 1e-4, given
        assert (found.shift_nats or 0.0) > 1e-3, given


@pytest.mark.usefixtures("plain")
def test_where_samples_cannot_be_compared_the_fixed_text_stands_for_them(colocated: Colocated, text_rows: Rows) -> None:
    found = measured(colocated("qwen3", text_rows, generation_kwargs={"min_tokens": 3}, **FAST))
    assert found.ok and found.max_nats <= 1e-4 and found.parts == []
    assert found.mean_nats == found.text_nats and found.tokens % 3 == 0


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("name", "value"), [("temperature", 0.6), ("top_p", 0.9)])
def test_another_parameter_in_the_engine_is_named(
    colocated: Colocated, text_rows: Rows, name: str, value: float
) -> None:
    trainer = colocated("qwen3", text_rows, **FAST)
    setattr(trainer.vllm_generation, name, value)
    found = measured(trainer)
    assert not found.ok and found.cause == "sampling parameters"
    assert f"{name} {value:g} where the trainer has 1" in next(c.evidence for c in found.causes if c.points == "yes")
    assert found.max_nats <= 1e-4 and (found.shift_nats or 0.0) > 0.05


@pytest.mark.usefixtures("plain")
def test_without_the_correction_fidelity_is_measured_all_the_same(colocated: Colocated, text_rows: Rows) -> None:
    found = measured(colocated("qwen3", text_rows, vllm_importance_sampling_correction=False, **FAST))
    assert found.ok and found.max_nats <= 1e-4 and found.tokens > 0
    assert found.dropped_share is None and found.dropped_of is None and found.shift_nats is None


def test_an_engine_in_another_number_format_is_named(colocated: Colocated, text_rows: Rows) -> None:
    """The trainer in float32, TRL's engine in bfloat16: within what bfloat16 rounds, and said to be."""
    found = measured(colocated("qwen3", text_rows, **FAST))
    assert found.ok and found.threshold_nats == 5e-2 and found.max_nats > 1e-4


@pytest.mark.usefixtures("unlocked")
def test_training_logs_what_trl_does_not(colocated: Colocated, text_rows: Rows) -> None:
    trainer = colocated("qwen3", text_rows, top_p=0.9, **FAST)
    trainer.train()
    first, *_, last = (line for line in trainer.state.log_history if "loss" in line)
    assert {name for name in first if name.startswith("rollout/")} == {
        "rollout/logp_diff_mean",
        "rollout/logp_diff_max",
        "rollout/sampling_shift",
        "rollout/dropped_samples",
        "rollout/text_logp_diff",
    }
    assert last["rollout/logp_diff_max"] <= 1e-4 < last["sampling/sampling_logp_difference/mean"]
    assert last["rollout/engine_moved"] == pytest.approx(last["rollout/trainer_moved"], rel=0.05)


@pytest.mark.usefixtures("unlocked")
def test_a_watched_trainer_that_is_probed_is_watched_once(colocated: Colocated, text_rows: Rows) -> None:
    trainer = colocated("qwen3", text_rows, **FAST)
    found = measured(trainer)
    sampled = sum(line["completions/mean_length"] * 4 for line in trainer.state.log_history if "loss" in line)
    assert found.tokens == pytest.approx(sampled) and found.updates_checked == 2
    assert found.ok and "rollout/text_logp_diff" in trainer.state.log_history[0]


def test_the_watch_leaves_with_the_unlocking(colocated: Colocated, text_rows: Rows) -> None:
    from trl import GRPOTrainer

    before = GRPOTrainer._generate_and_score_completions
    unlocking = unlock_vllm()
    colocated("qwen3", text_rows)
    assert GRPOTrainer._generate_and_score_completions is not before
    unlocking.remove()
    assert GRPOTrainer._generate_and_score_completions is before
