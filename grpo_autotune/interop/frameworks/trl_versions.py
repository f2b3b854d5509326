"""The keys of TRL's GRPO from 0.14, the first release with it, to 1.16: their defaults, and those that went.

Source: the dataclasses of the wheels of all these releases (`trl/trainer/{grpo,base,model}_config.py`,
`trl/scripts/utils.py`), with the defaults of transformers' `TrainingArguments` where TRL set none at the time. A key
that is older in spirit than in name is here with what the trainer did before: GRPO's loss of 0.14 is `grpo`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.source import Source

Version = tuple[int, int]
FIRST, NEWEST = (0, 14), (1, 16)

LAST_WITH = {  # release -> the keys that it is the last to have
    "0.17": "vllm_device vllm_dtype vllm_max_model_len vllm_enable_prefix_caching",
    "0.26": "torch_dtype gradient_checkpointing_use_reentrant wandb_log_unique_prompts",
    "0.27": "max_prompt_length vllm_guided_decoding_regex use_liger_loss",
}

DEFAULTS: Mapping[str, Mapping[Version, Any]] = {
    "per_device_train_batch_size": {(0, 14): 1, (0, 15): 8},
    "gradient_accumulation_steps": {(0, 14): 8, (0, 15): 1},
    "max_prompt_length": {(0, 14): 512, (0, 26): None},
    "max_completion_length": {(0, 14): 256, (1, 10): 512},
    "temperature": {(0, 14): 0.9, (0, 18): 1.0},
    "top_k": {(0, 14): 50, (0, 18): 0},
    "beta": {(0, 14): 0.04, (0, 19): 0.0},
    "loss_type": {(0, 14): "grpo", (0, 16): "bnpo", (0, 22): "dapo"},
    "use_bias_correction_kl": {(0, 14): False, (1, 10): True},
    "ref_model_mixup_alpha": {(0, 14): 0.9, (0, 16): 0.6},
    "ref_model_sync_steps": {(0, 14): 64, (0, 16): 512},
    "vllm_mode": {(0, 14): "device", (0, 16): "server", (1, 0): "colocate"},
    "vllm_gpu_memory_utilization": {(0, 14): 0.9, (0, 18): 0.3},
    "vllm_server_timeout": {(0, 14): 120.0, (0, 17): 240.0},
    "vllm_importance_sampling_correction": {(0, 14): False, (0, 23): True},
    "vllm_importance_sampling_mode": {(0, 14): "token_truncate", (0, 26): "sequence_mask"},
    "vllm_importance_sampling_clip_max": {(0, 14): 2.0, (0, 26): 3.0},
    "gradient_checkpointing": {(0, 14): False, (0, 22): True},
    "bf16": {(0, 14): False, (0, 19): None},
    "logging_steps": {(0, 14): 500, (0, 19): 10},
}
"""Key -> release -> its default from there on; keys that are not here always had the installed TRL's."""


def defaults(version: Version) -> dict[str, Any]:
    """Defaults of a release for every key of the installed `GRPOConfig`, and for those that are gone."""
    values = {name: key.default_value() for name, key in grpo_keys().items()}
    for name, history in DEFAULTS.items():
        values[name] = history[max(since for since in history if since <= version)]
    return values


def choose(source: Source, asked: str | None, pinned: str | None = None) -> tuple[Version, str, str]:
    """The release that a source was written for, its name, and why it is taken: `asked` for, in the file's own pins,
    `pinned` by its framework, or the newest that has all keys of the file. ConfigError for one without GRPO."""
    hint = source.hints.get("trl")
    name, why = (
        (asked, "--source-version") if asked
        else (hint, "the version that the file installs") if hint
        else (pinned, f"the version that {source.framework} pins") if pinned
        else by_keys(source.settings)
    )  # fmt: skip
    parts = (name or "").lstrip("v").split(".")
    if not all(part.isdecimal() for part in parts[:2]):
        raise ConfigError(f"{name!r} is no version of TRL", where="--source-version", fix="Such as 0.17.0 or 1.16.0.")
    version = (int(parts[0]), int(parts[1]) if len(parts) > 1 else 0)
    if version < FIRST:
        raise ConfigError(f"TRL {name} has no GRPO", where=source.path.name, fix="The first that has it is 0.14.")
    if version > NEWEST:
        why += f"; its defaults are taken to be those of {NEWEST[0]}.{NEWEST[1]}"
    return min(version, NEWEST), f"TRL {name}", why


def by_keys(keys: Collection[str]) -> tuple[str, str]:
    """The newest release that has all the keys, and the key that decides."""
    for release, names in LAST_WITH.items():
        if key := next((name for name in names.split() if name in keys), None):
            return release, f"assumed: the last release with the key {key} (--source-version)"
    return f"{NEWEST[0]}.{NEWEST[1]}", "assumed, as nothing in the file tells (--source-version)"
