"""Keys of older releases and of other programs: each is told what became of it, and none gets a chance neighbour."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config.foreign_keys import grpo_keys, peft_keys
from grpo_autotune.config.renamed_keys import MOVED, SAID, fate
from grpo_autotune.config.schema import RunConfig, known_paths
from grpo_autotune.config.vllm_names import NAMES
from grpo_autotune.errors import ConfigError


def told(section: str, key: str, value: object = 1) -> str:
    values: dict[str, Any] = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d"},
        "rewards": [{"name": "r"}],
    }
    values[section] = values.get(section, {}) | {key: value}
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(values)
    text = str(caught.value)
    assert text.startswith(f"{section}.{key}: unknown key. ") and len(text) < 250
    return text.partition("unknown key. ")[2]


def test_every_key_of_the_table_is_foreign_and_leads_to_a_key_of_ours() -> None:
    assert [key for key in (*grpo_keys(), *peft_keys()) if fate(key)] == []
    assert [key for key in NAMES if "has removed" in (fate(key) or "")] == []
    assert set(MOVED.values()) <= set(known_paths())
    assert not MOVED.keys() & SAID.keys()


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("max_prompt_length", "TRL removed it in 0.28: write data.max_prompt_tokens, and data.prompt_overflow: left."),
        ("vllm_device", "TRL removed it in 0.18: the engine is on the trainer's GPUs, or at a server (vllm.mode)."),
        ("torch_dtype", "Use model.dtype."),
        ("reward_funcs", "Use rewards."),
        ("lora_r", "Use peft.r."),
        ("vllm_max_model_len", "Use vllm.max_model_len."),
        ("vllm_guided_decoding_regex", "Use vllm.structured_outputs_regex."),
        ("model_name_or_path", "Use model.name_or_path."),
        ("dataset_name", "Use data.path."),
        ("no_cuda", "Use grpo.use_cpu."),
        ("evaluation_strategy", "Use grpo.eval_strategy."),
        ("kl_coef", "Use grpo.beta."),
        ("tokenizer", "It comes with the model folder, model.name_or_path."),
        ("warmup_ratio", "Transformers 5 removed it: grpo.warmup_steps below 1 is a share of all steps."),
        ("save_safetensors", "Transformers 5 removed it: weights are always saved as safetensors."),
        ("mp_parameters", "transformers has removed this key: delete it."),
        ("swap_space", "vLLM has removed this key: delete it."),
        ("lora_alpha", "Nearest known key: peft.lora_alpha."),
        ("system_prompt", "Nearest known key: data.system_prompt."),
    ],
)
def test_an_old_or_foreign_key_is_told_what_became_of_it(key: str, advice: str) -> None:
    assert told("grpo", key) == advice


@pytest.mark.parametrize("key", ["top_n", "min_k", "bf32", "gamma", "steps", "epsilon_max", "use_cuda", "logging_dirs"])
def test_a_key_that_only_resembles_another_gets_no_neighbour(key: str) -> None:
    assert told("grpo", key).startswith("Known here: per_device_train_batch_size, ")


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("grpo", "num_generation", "grpo.num_generations"),
        ("grpo", "leanring_rate", "grpo.learning_rate"),
        ("grpo", "max_step", "grpo.max_steps"),
        ("model", "dytpe", "model.dtype"),
        ("data", "splt", "data.split"),
        ("peft", "lora_droput", "peft.lora_dropout"),
        ("vllm", "enable_prefix_cashing", "vllm.enable_prefix_caching"),
    ],
)
def test_a_slip_of_the_finger_is_recognised(section: str, key: str, meant: str) -> None:
    assert told(section, key) == f"Nearest known key: {meant}."


def test_nothing_is_known_of_other_keys() -> None:
    assert fate("num_generations") is None
