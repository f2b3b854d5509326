"""Sampling settings are refused under their own names before anything is loaded, with the nearest legal value."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config import sampling
from grpo_autotune.config.sampling import check_sampling
from grpo_autotune.errors import ConfigError


@pytest.mark.parametrize(
    ("grpo", "expected"),
    [
        ({"temperature": 0}, "grpo.temperature: must be above 0, and is 0. Nearest legal: 0.01 (completions of"),
        ({"temperature": -1.0}, "grpo.temperature: must be above 0, and is -1.0. Nearest legal: 0.01"),
        ({"temperature": float("inf")}, "grpo.temperature: must be above 0, and is inf. Nearest legal: 0.01"),
        ({"temperature": float("nan")}, "grpo.temperature: must be above 0, and is nan."),
        ({"top_k": -1}, "grpo.top_k: must be at least 0, and is -1. Nearest legal: 0 (0 takes every token)."),
        ({"min_p": 2}, "grpo.min_p: must be at least 0 and at most 1, and is 2. Nearest legal: 1 (0 takes"),
        ({"top_p": 0}, "grpo.top_p: must be above 0 and at most 1, and is 0. Nearest legal: 0.01 (1.0 takes"),
        ({"top_p": 1.5}, "grpo.top_p: must be above 0 and at most 1, and is 1.5. Nearest legal: 1 (1.0"),
        ({"repetition_penalty": 0}, "grpo.repetition_penalty: must be above 0, and is 0."),
        ({"use_vllm": True, "top_k": -2}, "grpo.top_k: must be at least -1, and is -2."),
        ({"use_vllm": True, "temperature": 0.001}, "grpo.temperature: must be at least 0.01 and at most 2"),
    ],
)
def test_a_value_that_nothing_samples_with(grpo: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sampling(grpo)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"top_p": 0}, "top_p: must be above 0 and at most 1"),
        (
            {"stop_strings": ["</a>"]},
            "stop_strings: this setting cannot be used here. TRL gives `generate`",
        ),
        ({"disable_compile": False}, "disable_compile: this setting cannot be used here. TRL gives it"),
        ({"max_new_tokens": 5}, "max_new_tokens: this setting cannot be used here. Use grpo.max_compl"),
        ({"do_sample": False}, "do_sample: all completions of a group would be the same. Remove it."),
        ({"no_such": 1}, "no_such: transformers' GenerationConfig has no such setting. Remove it."),
        (
            {"suppres_tokens": [1]},
            "suppres_tokens: transformers' GenerationConfig has no such setting. Nearest: suppre",
        ),
    ],
)
def test_a_further_setting_that_does_nothing_or_harm(setting: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sampling({"generation_kwargs": setting})
    assert str(caught.value).startswith(f"grpo.generation_kwargs.{expected}")


def test_what_samples_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sampling({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": None, "repetition_penalty": 1.1})
    check_sampling({"generation_kwargs": {"num_beams": 2, "typical_p": 0.5, "suppress_tokens": [3]}})
    check_sampling({"generation_kwargs": '{"typical_p": 0.5}'})
    check_sampling({"use_vllm": True, "top_k": -1})
    monkeypatch.setattr(sampling, "_engine_names", lambda: frozenset({"stop"}))
    check_sampling({"use_vllm": True, "generation_kwargs": {"stop": ["</a>"]}})
    with pytest.raises(ConfigError, match=r"vLLM's SamplingParams has no such setting\. Nearest: stop\."):
        check_sampling({"use_vllm": True, "generation_kwargs": {"stopp": ["</a>"]}})


def test_settings_are_those_of_the_installed_class() -> None:
    from transformers import GenerationConfig

    assert {"typical_p", "suppress_tokens", "eos_token_id"} <= sampling._generate_names()
    assert sampling._generate_names() <= vars(GenerationConfig()).keys() | {
        "is_assistant",
        "continuous_batching_config",
    }
