"""The ladder of a training that ran out of memory: what learns the same first, the rest by consent, nothing twice."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs import knobs_of, with_knobs
from grpo_autotune.knobs.ladder import Stage, descended, kind_of_rung, next_rung
from grpo_autotune.records.alerts import Rung
from tests.knobs.test_knobs import MICRO, config, machine

CHECKPOINTING = "grpo.gradient_checkpointing"
LENGTH = "grpo.max_completion_length"


def rung(before: RunConfig, knobs: dict[str, Any]) -> Rung:
    facts: Any = {"step": 3, "value": 1.0, "text": "memory ran out", "remedy": "train with less"}
    return Rung(knobs=knobs, before=knobs_of(before, knobs), kind=kind_of_rung(before, knobs), **facts)


def walk(start: RunConfig, stage: Stage = "training", gpus: int = 0) -> list[Rung]:
    """Every rung from a configuration to the end of its ladder."""
    rungs: list[Rung] = []
    while (knobs := next_rung(start, machine(gpus), stage, [one.knobs for one in rungs])) is not None:
        rungs.append(rung(start, knobs))
        start = with_knobs(start, knobs)
    return rungs


def test_what_learns_the_same_comes_first_and_the_rest_only_where_it_is_allowed() -> None:
    plain = config({"speedups": "none"}, gradient_checkpointing=False, max_completion_length=12)
    exact = [{MICRO: 2}, {MICRO: 1}, {CHECKPOINTING: True}]
    assert [(one.knobs, one.kind) for one in walk(plain)] == [(knobs, "exact") for knobs in exact]
    allowed = plain.model_copy(update={"on_oom_allow": ["lora_rank", "max_completion_length"]})
    rungs = walk(allowed)
    assert [one.knobs for one in rungs[:7]] == [*exact, {"peft.r": 4}, {LENGTH: 9}, {"peft.r": 2}, {LENGTH: 6}]
    assert {one.kind for one in rungs[3:]} == {"learning"} and rungs[-1].knobs == {LENGTH: 1}


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_the_micro_batch_is_left_alone_where_the_loss_depends_on_it(loss: str) -> None:
    plain = config({"speedups": "none"}, loss_type=loss)
    consented = plain.model_copy(update={"on_oom_allow": ["micro_batch"]})
    assert (next_rung(plain, machine()) == {MICRO: 2}) == (loss != "bnpo")
    assert next_rung(consented, machine()) == {MICRO: 2}
    assert kind_of_rung(plain, {MICRO: 2}) == ("learning" if loss == "bnpo" else "exact")


def test_a_rung_keeps_the_rows_of_a_step_and_of_a_generation() -> None:
    for start in (config(steps_per_generation=8), config(generation_batch_size=32), config()):
        lower = with_knobs(start, {MICRO: 2})
        assert (lower.batch.completions_per_step, lower.batch.generation_batch) == (16, start.batch.generation_batch)
    fewer = next_rung(config({"speedups": "none", "on_oom_allow": ["num_generations"]}, per_device_train_batch_size=1,
                             gradient_accumulation_steps=16), machine())  # fmt: skip
    assert fewer == {"grpo.num_generations": 4, "prompts_per_step": 2}  # as many prompts, so half the completions


def test_speed_ups_that_hold_memory_go_before_activations_are_computed_twice() -> None:
    knobs = walk(config({"model": {"random_init": "qwen3-0.6b", "dtype": "float32"}}, gradient_checkpointing=False))
    assert [next(iter(one.knobs)) for one in knobs] == [MICRO, MICRO, "speedups", CHECKPOINTING]
    assert "merge_for_generation" not in knobs[2].knobs["speedups"] and "lora_input" in knobs[2].knobs["speedups"]


def test_only_what_can_help_the_part_that_ran_out() -> None:
    text = {"speedups": "none", "on_oom_allow": ["max_completion_length"]}
    assert list(walk(config(text), "generation")[0].knobs) == [LENGTH]
    assert walk(config(text), "engine") == []
    engine = config({**text, "vllm": {"gpu_memory_utilization": 0.5, "max_num_seqs": 8}}, use_vllm=True)
    rungs = walk(engine, "engine", gpus=1)
    assert rungs[0].knobs == {"vllm.gpu_memory_utilization": 0.425, "vllm.max_num_seqs": 6}
    assert rungs[0].change == "vllm.gpu_memory_utilization 0.5 -> 0.425, vllm.max_num_seqs 8 -> 6"
    assert all(one.knobs["vllm.gpu_memory_utilization"] >= 0.1 for one in rungs) and len(rungs) < 12


def test_rungs_hold_for_the_configuration_that_took_them_and_for_its_stored_one() -> None:
    user = config({"speedups": "none"})
    rungs = walk(user)
    lowered, held = descended(user, rungs)
    assert held == rungs and knobs_of(lowered, [MICRO]) == {MICRO: 1}
    assert descended(lowered, rungs) == (lowered, [])  # `config.yaml` of the run folder
    other = config({"speedups": "none"}, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert descended(other, rungs) == (other, [])  # what the user has changed meanwhile


@pytest.mark.parametrize("key", ["auto_find_batch_size", "save_only_model"])
def test_a_ladder_beside_a_setting_that_breaks_it_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"grpo.{key}: on_oom ladder cannot"):
        config({"on_oom": "ladder"}, **{key: True})
    with pytest.raises(ConfigError, match="on_oom_allow"):
        config({"on_oom_allow": ["rank"]})
