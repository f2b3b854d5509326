"""The sections resample and eval_sampling: what is legal survives a round trip, and each mistake is one line."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError

EVALUATES = {"eval_strategy": "steps", "num_generations_eval": 4, "per_device_eval_batch_size": 4}
SERVER = {**EVALUATES, "use_vllm": True}


def config(**sections: Any) -> RunConfig:
    rewards = [{"name": "exact_match", "label": "right"}, {"name": "format"}]
    values = {"model": {"name_or_path": "demo"}, "data": {"path": "digits", "eval_split": "test"}, "rewards": rewards}
    return RunConfig.from_dict({**values, **sections})


def test_both_survive_yaml_and_are_off_unless_asked_for() -> None:
    both = config(resample={}, eval_sampling={"temperature": 0}, grpo=EVALUATES)
    assert both.resample is not None and both.resample.max_rounds == 10
    assert RunConfig.from_yaml(both.to_yaml()) == both
    none = config(grpo=EVALUATES)
    assert none.resample is None is none.eval_sampling
    assert config(resample={"reward": "format"}).resample is not None
    one = config(eval_sampling={"temperature": 0}, grpo={**SERVER, "num_generations_eval": 1}, vllm={"mode": "server"})
    assert RunConfig.from_yaml(one.to_yaml()) == one


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"resample": {"max_rounds": 1}}, "resample.max_rounds: 1 is not accepted. Accepted: at least 2."),
        ({"resample": {"rounds": 3}}, "resample.rounds: unknown key. Known here: max_rounds, reward."),
        ({"resample": {"reward": "rihgt"}}, "resample.reward: no reward has the label or name 'rihgt'. Nearest: right"),
        ({"resample": {"reward": "exact_match"}}, "resample.reward: no reward has the label or name 'exact_match'."),
        (
            {"resample": {}, "branches": {"all": {"beta": 0.1}}},
            "resample: it would change the branches' shares of the prompts. Remove it.",
        ),
        ({"eval_sampling": {"temperature": 0}}, "eval_sampling: nothing is evaluated. Set grpo.eval_strategy"),
        (
            {"eval_sampling": {"temperature": -1}, "grpo": EVALUATES},
            "eval_sampling.temperature: must be at least 0, and is -1.0. Nearest legal: 0 (0 is greedy).",
        ),
        ({"eval_sampling": {"top_k": -1}, "grpo": EVALUATES}, "eval_sampling.top_k: must be at least 0, and is -1."),
        ({"eval_sampling": {"n": 1}, "grpo": EVALUATES}, "eval_sampling.n: unknown key."),
        (
            {"eval_sampling": {"temperature": 0}, "grpo": SERVER, "vllm": {"mode": "server"}},
            "eval_sampling.temperature: a vLLM server gives one greedy completion of a prompt, and 4 are asked for.",
        ),
    ],
)
def test_a_mistake_is_one_line(sections: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    assert str(caught.value).startswith(line)
