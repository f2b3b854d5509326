"""DeepSpeed's and accelerate's configurations, alone and beside a framework's."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.importing import import_file
from grpo_autotune.records.imported import Imported

SCRIPT = """{start} \\
    --rlhf_type grpo \\
    --model org/Model \\
    --tuner_type {kind} \\
    --dataset rows.jsonl \\
    --reward_funcs format \\
    --per_device_train_batch_size 8 {more}
"""
ZERO = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "train_batch_size": 64,
    "gradient_accumulation_steps": "auto", "gradient_clipping": 0.5, "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-6, "betas": [0.9, 0.98], "eps": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 20}},
}  # fmt: skip
ACCELERATE: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "bf16",
    "num_processes": 4, "downcast_bf16": "no",
    "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu", "zero3_save_16bit_model": True},
}  # fmt: skip


def imported(folder: Path, *, start: str, kind: str = "lora", more: str = "", **how: Any) -> Imported:
    (folder / "run.sh").write_text(SCRIPT.format(start=start, kind=kind, more=more))
    result = import_file(folder / "run.sh", **how).finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(result.world_size))
        RunConfig.from_dict(result.config)
    return result


def launched(folder: Path, config: dict[str, Any], **how: Any) -> Imported:
    (folder / "several.yaml").write_text(yaml.safe_dump(config))
    return imported(folder, start="accelerate launch --config_file several.yaml swift/cli/rlhf.py", **how)


def test_values_of_the_run_leave_deepspeed(tmp_path) -> None:
    """They are in the run's keys, where DeepSpeed has `auto` for them; ZeRO stays as it was."""
    (tmp_path / "ds.json").write_text(json.dumps(ZERO))
    result = imported(tmp_path, start="NPROC_PER_NODE=2 swift rlhf", more="--deepspeed conf/ds.json")
    grpo = result.config["grpo"]
    said = ("max_grad_norm", "learning_rate", "adam_beta2", "lr_scheduler_type", "warmup_steps", "bf16")
    assert [grpo[key] for key in said] == [0.5, 3e-6, 0.98, "linear", 20, True]
    kept = grpo["deepspeed"]
    assert kept["zero_optimization"] == ZERO["zero_optimization"]
    assert {kept[key] for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")} == {"auto"}
    assert kept["bf16"] == {"enabled": "auto"} and not {"optimizer", "scheduler"} & kept.keys()
    overruled = {row.key: row.kind for row in result.rows if "which is taken" in row.why}
    assert overruled == dict.fromkeys(("learning_rate", "adam_beta2", "lr_scheduler_type"), "changes")
    files = {row.key: row.file for row in result.rows if row.key.startswith("deepspeed.")}
    assert set(files.values()) == {"ds.json"} and "deepspeed.optimizer.params.lr" in files


@pytest.mark.parametrize(
    ("kind", "more", "dtype", "why"),
    [
        ("lora", "zero3_offload", None, "moved off the GPU"),
        ("full", "zero3", "float32", "32-bit"),
        ("full", "zero2 --torch_dtype float16", "float32", "32-bit"),
        ("lora", "away.json", None, "not at hand"),
    ],
)
def test_one_process_shares_nothing(tmp_path, kind, more, dtype, why) -> None:
    """The weights of a full training stay in 32 bits, as ZeRO keeps them."""
    result = imported(tmp_path, start="swift rlhf", kind=kind, more=f"--deepspeed {more}")
    row = next(row for row in result.rows if row.key == "deepspeed")
    assert "deepspeed" not in result.config["grpo"] and result.config["model"].get("dtype") == dtype
    assert why in row.why and (row.kind == "changes") == ("away" in more)
    assert result.config["grpo"].get("fp16", False) == ("float16" in more)


def test_deepspeed_that_is_not_at_hand_is_told_and_the_rest_loads(tmp_path) -> None:
    result = imported(tmp_path, start="NPROC_PER_NODE=2 swift rlhf", more="--deepspeed far/away.json")
    row = next(row for row in result.rows if row.key == "deepspeed")
    assert "deepspeed" not in result.config["grpo"]
    lost = "the file is not at hand: what it says of the run is lost"
    assert (row.kind, row.why) == ("changes", f"{lost}, and nothing is sharded: set `grpo.deepspeed`")


@pytest.mark.parametrize(("kind", "verdict"), [("log", "changes"), ("linear", "converted")])
def test_a_warm_up_of_deepspeed_is_a_logarithm_by_default(tmp_path, kind, verdict) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 20, "warmup_type": kind}}
    (tmp_path / "ds.json").write_text(json.dumps({**ZERO, "scheduler": scheduler}))
    result = imported(tmp_path, start="NPROC_PER_NODE=2 swift rlhf", more="--deepspeed ds.json")
    assert {row.key: row.kind for row in result.rows}["deepspeed.scheduler.type"] == verdict


def test_accelerate_says_processes_and_zero(tmp_path) -> None:
    result = launched(tmp_path, ACCELERATE)
    assert result.world_size == 4
    zero = result.config["grpo"]["deepspeed"]["zero_optimization"]
    assert zero == {
        "stage": 3, "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip
    table = {row.key: row for row in result.rows}
    assert all(row.kind != "none" for row in result.rows)
    assert table["launch.mixed_precision"].why == "the run's own bf16 or fp16 wins"
    assert "deepspeed" not in launched(tmp_path, ACCELERATE, world_size=1).config["grpo"]


SIZES = [f"parallelism_config_{kind}_size" for kind in ("sp", "tp", "cp")]


def test_accelerate_with_ranks_that_share_a_sequence(tmp_path) -> None:
    shared = {"parallelism_config": dict(zip(SIZES, (2, 1, None), strict=True))}
    table = {row.key: row.kind for row in launched(tmp_path, {**ACCELERATE, **shared}).rows}
    assert [table[f"launch.parallelism_config.{size}"] for size in SIZES] == ["none", "speed", "speed"]


def test_accelerate_with_fsdp(tmp_path) -> None:
    config = {key: value for key, value in ACCELERATE.items() if key != "deepspeed_config"}
    config |= {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}}
    grpo = launched(tmp_path, config).config["grpo"]
    assert grpo["fsdp_config"] == {"version": 2, "reshard_after_forward": True, "cpu_offload": False}
    assert "fsdp_config" not in launched(tmp_path, config, world_size=1).config["grpo"]
    first = {"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP", "fsdp_use_orig_params": True}
    config["fsdp_config"] = {**first, "fsdp_activation_checkpointing": True}
    grpo = launched(tmp_path, config).config["grpo"]
    assert grpo["fsdp_config"] == {"version": 2, "reshard_after_forward": False, "activation_checkpointing": True}
    assert grpo["gradient_checkpointing"] is False


def test_accelerate_that_names_a_deepspeed_file(tmp_path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO))
    config = {**ACCELERATE, "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    grpo = launched(tmp_path, config).config["grpo"]
    assert grpo["deepspeed"]["zero_optimization"]["stage"] == 2 and grpo["learning_rate"] == 3e-6


@pytest.mark.parametrize(("name", "content"), [("ds.json", ZERO), ("several.yaml", ACCELERATE)])
def test_alone_they_say_nothing_of_a_training(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="and not what is trained") as raised:
        import_file(tmp_path / name)
    assert "\n" not in str(raised.value)
