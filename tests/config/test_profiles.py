"""Every shipped profile is a legal configuration whose names all exist."""

from __future__ import annotations

import pytest

from grpo_autotune.config.foreign_keys import OWN_GRPO_KEYS
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.sources import profile_names, profiles_folder, resolve_source
from grpo_autotune.registry import is_reference, names, resolve
from grpo_autotune.train.rewards.build import build_rewards

SHIPPED = {
    "demo",
    "judge-openai",
    "qwen2.5-vl-7b-qlora-1gpu",
    "qwen3-1.7b-gsm8k-1gpu",
    "qwen3-vl-2b-lora-1gpu",
    "two-objectives",
}


def test_the_promised_profiles_are_shipped() -> None:
    assert set(profile_names()) == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_profile_is_legal_and_its_rewards_exist(name: str) -> None:
    assert resolve_source(name) == (f"profile {name}", profiles_folder() / f"{name}.yaml")
    config = load_config(name)
    assert config.output.name == name
    assert RunConfig.from_yaml(config.to_yaml()) == config
    functions, weights, _ = build_rewards(config)
    assert len(functions) == len(weights) == len(config.rewards)
    if config.data.path in names("dataset") or is_reference(config.data.path):
        assert callable(resolve("dataset", config.data.path))


@pytest.mark.parametrize("name", sorted(SHIPPED - {"demo"}))
def test_a_profile_fits_trl(name: str) -> None:
    """The installed `GRPOConfig` and `LoraConfig` take every key and value."""
    from peft import LoraConfig
    from trl import GRPOConfig

    config = load_config(name)
    arguments = (
        {key: value for key, value in config.grpo.items() if key not in OWN_GRPO_KEYS}
        | config.vllm.grpo_kwargs()
        | {"output_dir": "x", "use_cpu": True, "bf16": False}
    )
    assert GRPOConfig(**arguments).generation_batch_size == config.batch.generation_batch
    assert config.peft is not None and LoraConfig(**config.peft).r == config.peft["r"]
