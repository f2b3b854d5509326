"""TRL's own rewards through the registry's door: the values of TRL's functions, with parameters of a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, RewardError
from grpo_autotune.train.rewards.build import build_rewards


def build(name: str, **params: Any) -> Any:
    values = {
        "model": {"name_or_path": "demo"},
        "data": {"path": "digits"},
        "rewards": [{"name": name, "params": params}],
    }
    functions, _, names = build_rewards(RunConfig.from_dict(values))
    assert names == [name]
    return functions[0]


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


THIRD, HALF = r"My answer is \boxed{\frac{1}{3}}", r"My answer is \boxed{\frac{1}{2}}"
GOLD = [r"\frac{1}{3}"] * 2


def test_accuracy_by_math_verify() -> None:
    assert build("accuracy_reward")(completions=said(THIRD, HALF), solution=GOLD) == [1.0, 0.0]
    reward = build("accuracy_reward", column="answer")
    assert reward(completions=said(THIRD, r"\boxed{0.5}"), answer=["1/3", 0.5]) == [1.0, 1.0]
    with pytest.raises(ConfigError, match="the data has no column solution"):
        build("accuracy_reward")(completions=said(THIRD), answer=["1/3"])


def test_accuracy_behind_the_reasoning() -> None:
    texts = [f"<think> {HALF} </think> {THIRD}", f"<think> {THIRD}"]
    assert build("reasoning_accuracy_reward")(completions=said(*texts), solution=GOLD) == [1.0, 0.0]
    reward = build("reasoning_accuracy_reward", reasoning_delimiters=["###"])
    assert reward(completions=said(f"{HALF} ### {THIRD}", THIRD), solution=GOLD) == [1.0, 0.0]


def test_cosine_scaled() -> None:
    ids = [[0] * 50, [0] * 50]
    reward = build("cosine_scaled_reward", max_len=100)
    assert reward(completions=said(THIRD, HALF), completion_ids=ids, solution=GOLD) == [0.75, -0.75]
    reward = build("cosine_scaled_reward", max_len=50, min_value_correct=0.25, max_value_wrong=0.0)
    assert reward(completions=said(THIRD, HALF), completion_ids=ids, solution=GOLD) == [0.25, 0.0]


def test_think_format() -> None:
    texts = ["<think>\nThis is my reasoning.\n</think>\nThis is my answer.", "<think>\nNo end."]
    assert build("think_format_reward")(completions=said(*texts)) == [1.0, 0.0]


def test_repetition_penalty() -> None:
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5]]
    assert build("repetition_penalty_reward", ngram_size=2)(completions=said("", ""), completion_ids=ids) == [
        0.0,
        -0.75,
    ]


def test_soft_overlong_punishment() -> None:
    reward = build("soft_overlong_punishment", max_completion_len=100, soft_punish_cache=20)
    ids = [[1] * count for count in (80, 90, 100, 101)]
    assert reward(completions=said("", "", "", ""), completion_ids=ids) == [0.0, -0.5, -1.0, -1.0]


def test_parameters_are_judged() -> None:
    with pytest.raises(ConfigError, match=r"rewards\[0\].params.max_length: the function has no such parameter"):
        build("soft_overlong_punishment", max_length=3)
    with pytest.raises(RewardError, match="soft_overlong_punishment: raised TypeError"):
        build("soft_overlong_punishment")(completions=said(""), completion_ids=[[1]])
