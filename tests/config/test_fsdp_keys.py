"""FSDP2 as it is asked for: keys, older words, accelerate's launcher, and every contradiction in one line."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.fsdp import KEYS, USE, VARIABLES, asked, of_file
from grpo_autotune.errors import ConfigError

LAUNCHED = {
    USE: "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "One,Two",
}  # fmt: skip
"""What `accelerate launch` 1.15 gives its processes for a file with `fsdp_version: 2`."""


def options(grpo: dict[str, Any], environ: dict[str, str] | None = None) -> dict[str, Any] | None:
    return asked(grpo, environ or {})[0]


@pytest.mark.parametrize(
    ("grpo", "environ", "expected"),
    [
        ({}, {}, None),
        ({"fsdp": False, "fsdp_config": {"version": 2}}, {}, None),
        ({"fsdp": ""}, {}, None),
        ({"fsdp_config": {}}, {}, {}),
        ({"fsdp": True}, {}, {}),
        ({"fsdp": ["shard_grad_op", "offload"]}, {}, {"reshard_after_forward": False, "cpu_offload": True}),
        (
            {"fsdp_config": {"fsdp_cpu_offload": "true", "transformer_layer_cls_to_wrap": "One,Two"}},
            {},
            {"cpu_offload": True, "transformer_layer_cls_to_wrap": ["One", "Two"]},
        ),
        (
            {"fsdp_config": {"reshard_after_forward": True}},
            {USE: "1", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            {"version": 2, "cpu_offload": True, "reshard_after_forward": True},
        ),
    ],
)
def test_ways_of_asking(grpo: dict[str, Any], environ: dict[str, str], expected: dict[str, Any] | None) -> None:
    assert options(grpo, environ) == expected


def test_a_launcher_says_all_that_a_file_does() -> None:
    found = options({}, LAUNCHED)
    assert found is not None and found.keys() == KEYS.keys() - {"min_num_params"}
    assert found["transformer_layer_cls_to_wrap"] == ["One", "Two"] and found["cpu_offload"] is False


def test_words_that_are_read_as_keys_are_told() -> None:
    found, note = asked({"fsdp": "full_shard auto_wrap"}, {})
    assert found == {"reshard_after_forward": True}
    assert note is not None and note.endswith("is read as grpo.fsdp_config {reshard_after_forward: true}")


@pytest.mark.parametrize(
    ("grpo", "environ", "told"),
    [
        ({"fsdp": "hybrid_shard auto_wrap"}, {}, "grpo.fsdp: FSDP2 has no hybrid_shard. Write grpo.fsdp_config"),
        ({"fsdp_config": {"version": 1}}, {}, "grpo.fsdp_config.version: FSDP1 is not supported"),
        ({"fsdp_config": {"use_orig_params": True}}, {}, "use_orig_params: FSDP1 alone has this key"),
        ({"fsdp_config": {"offload_params": True}}, {}, "offload_params: unknown key. Use cpu_offload."),
        ({"fsdp_config": {"reshard": True}}, {}, "grpo.fsdp_config.reshard: unknown key"),
        ({"fsdp_config": {"cpu_offload": "maybe"}}, {}, "cpu_offload: 'maybe' is not accepted. Accepted: true or"),
        ({"fsdp_config": "none.json"}, {}, "grpo.fsdp_config: cannot read none.json"),
        ({"fsdp_config": {}, "deepspeed": "zero3"}, {}, "grpo.deepspeed: DeepSpeed and FSDP both shard the model"),
        ({"fsdp_config": {}}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed and FSDP both shard the model"),
        (
            {"fsdp_config": {"activation_checkpointing": True}, "gradient_checkpointing": True},
            {},
            "activation_checkpointing: grpo.gradient_checkpointing is true as well",
        ),
        ({"fsdp_config": {"activation_checkpointing": True, "auto_wrap_policy": "NO_WRAP"}}, {}, "NO_WRAP names none"),
        ({"fsdp": False}, LAUNCHED, "grpo.fsdp: false, and accelerate launch asks for FSDP"),
        ({"fsdp_config": {"cpu_offload": True}}, LAUNCHED, "True here, and False by accelerate launch (FSDP_OFFLOAD"),
        ({}, {**LAUNCHED, "FSDP_VERSION": "1"}, "accelerate launch, fsdp_config.version: FSDP1 is not supported"),
    ],
)
def test_what_is_refused(grpo: dict[str, Any], environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(grpo, environ)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_file_is_read_when_a_run_starts(tmp_path: Path) -> None:
    values = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": [{"name": "format"}]}
    path = tmp_path / "fsdp.json"
    assert RunConfig.from_dict({**values, "grpo": {"fsdp_config": str(path)}}).grpo["fsdp_config"] == str(path)
    with pytest.raises(ConfigError, match="FSDP1 alone"):
        RunConfig.from_dict({**values, "grpo": {"fsdp_config": {"sync_module_states": True}}})
    path.write_text(json.dumps({"cpu_offload": True}))
    assert options({"fsdp_config": str(path)}) == {"cpu_offload": True}
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="cannot read"):
        options({"fsdp_config": str(path)})


def test_the_file_of_accelerate() -> None:
    first = {"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP", "fsdp_use_orig_params": True}
    assert of_file({**first, "fsdp_offload_params": "true"}) == {
        "version": 2, "reshard_after_forward": False, "cpu_offload": True,
    }  # fmt: skip


def test_the_table_is_the_libraries() -> None:
    """Each key is one that transformers reads, and each variable one that accelerate's launcher sets."""
    from accelerate.utils import launch
    from transformers import TrainingArguments

    read = inspect.getsource(TrainingArguments._process_fsdp_args)
    assert all(f'"{name}"' in read for name in KEYS)
    source = inspect.getsource(launch)
    assert all(f'"{name}"' in source for name in (USE, *VARIABLES.values()))
