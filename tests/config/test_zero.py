"""`grpo.deepspeed` by name, as a mapping and as a file: what DeepSpeed is given, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.zero import deepspeed_keys
from grpo_autotune.errors import ConfigError

RUN = "model: {name_or_path: m}\ndata: {path: d}\nrewards: [{name: format}]\n"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_name_stands_for_a_stage(stage: int) -> None:
    keys = deepspeed_keys(f"zero{stage}")
    zero = keys["zero_optimization"]
    assert zero["stage"] == stage and zero["overlap_comm"] and zero["contiguous_gradients"]
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)
    assert keys["bf16"] == keys["fp16"] == {"enabled": "auto"}
    counts = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {keys[name] for name in counts} == {"auto"}


def test_keys_beside_a_name_win() -> None:
    persistence = {"stage3_param_persistence_threshold": 0}
    keys = deepspeed_keys(
        {"name": "zero3", "offload": "cpu", "zero_optimization": persistence, "wall_clock_breakdown": True}
    )
    zero = keys["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0 and zero["stage"] == 3 and keys["wall_clock_breakdown"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in deepspeed_keys({"name": "zero2", "offload": "cpu"})["zero_optimization"]
    assert deepspeed_keys("zero3")["zero_optimization"]["stage3_param_persistence_threshold"] == "auto"
    theirs = {"zero_optimization": {"stage": 2, "sub_group_size": 7}, "bf16": {"enabled": True}}
    assert deepspeed_keys(theirs) == theirs


def test_a_file_is_read_from_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ds.json").write_text(json.dumps(theirs))
    run = tmp_path / "sub" / "run.yaml"
    run.write_text(RUN + "grpo: {deepspeed: ds.json}")
    monkeypatch.chdir(tmp_path)
    config = load_config(run)
    assert config.grpo["deepspeed"] == theirs and RunConfig.from_yaml(config.to_yaml()) == config
    assert load_config(run, ["grpo.deepspeed=sub/ds.json"]).grpo["deepspeed"] == theirs  # typed in the current folder
    assert load_config(run, ["grpo.deepspeed=zero2"]).grpo["deepspeed"] == "zero2"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("zero4", "grpo.deepspeed: there is no zero4. Nearest: zero"),
        ("ds.json", "grpo.deepspeed: there is no file ds.json"),
        ({"name": "stage 2"}, "grpo.deepspeed: there is no stage 2"),
        ({"name": "zero2", "offload": "disk"}, "grpo.deepspeed.offload: disk is not offered"),
        ({"offload": "cpu", "zero_optimization": {"stage": 2}}, "grpo.deepspeed.offload: goes with a name"),
        ({"name": "zero2", "zero_optimization": {"stage": 3}}, "zero_optimization.stage: zero2 is stage 2"),
        ({"bf16": {"enabled": True}}, "zero_optimization: no mapping, and without it nothing is sharded"),
        ({"name": "zero2", "optimizer": "AdamW"}, "grpo.deepspeed.optimizer: 'AdamW' is no mapping"),
        ({"name": "zero2", "optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params: [1] is no mapping"),
        ({"name": "zero2", "bf16": True}, "grpo.deepspeed.bf16: True is no mapping"),
        (
            {"name": "zero3", "zero_optimization": {"offload_optimizer": "cpu"}},
            "grpo.deepspeed.zero_optimization.offload_optimizer: 'cpu' is no mapping",
        ),
    ],
)
def test_mistakes_are_one_line(value: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(
            {
                "model": {"name_or_path": "m"},
                "data": {"path": "d"},
                "rewards": [{"name": "format"}],
                "grpo": {"deepspeed": value},
            }
        )
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "told"), [("{", "is no JSON"), ("[1]", "holds no JSON object")])
def test_a_file_that_is_no_json_object(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    (tmp_path / "run.yaml").write_text(RUN + "grpo: {deepspeed: ds.json}")
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "run.yaml")
