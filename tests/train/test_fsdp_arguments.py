"""FSDP2 in transformers' keys and accelerate's variables, and what is refused before a model loads."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.train import arguments


def written(monkeypatch: pytest.MonkeyPatch, fsdp: Any, processes: int = 2, **sections: Any) -> dict[str, Any]:
    """The keys of `grpo` that go to TRL; variables are put back."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(arguments, "LAUNCHED", {})
    values = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "rewards": [{"name": "format"}], **sections}
    keys: dict[str, Any] = {"fsdp_config": fsdp}
    keys["notes"] = arguments._fully_sharded(keys, RunConfig.from_dict(values))
    keys["environ"] = {name: value for name, value in os.environ.items() if "FSDP" in name}
    arguments._fully_sharded({}, RunConfig.from_dict(values))
    assert not any("FSDP" in name for name in os.environ)
    return keys


def test_whole_models_and_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = written(monkeypatch, {"cpu_offload": True, "transformer_layer_cls_to_wrap": ["A", "B"]})
    assert keys["fsdp"] is True and keys["fsdp_config"]["cpu_offload"] is True and not keys["notes"]
    assert keys["accelerator_config"] == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert keys["environ"] == {
        "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B",
    }  # fmt: skip
    keys = written(monkeypatch, {"activation_checkpointing": True}, peft={"r": 4})
    assert "accelerator_config" not in keys and keys["gradient_checkpointing"] is False
    assert keys["notes"] == ["grpo.fsdp_config.activation_checkpointing takes the place of grpo.gradient_checkpointing"]


@pytest.mark.parametrize(
    ("fsdp", "more", "told"),
    [
        ({}, {"processes": 1}, "one process has nobody to share the weights with"),
        ({"activation_checkpointing": True}, {"peft": {"lora_dropout": 0.1}}, "random numbers of its dropout"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, fsdp: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        written(monkeypatch, fsdp, **more)


@pytest.mark.parametrize(
    ("keys", "dtype"), [({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16"), ({}, "float32")]
)
def test_weights_in_4_bits_lie_in_what_is_gathered(keys: dict[str, Any], dtype: str) -> None:
    given = {"bf16": False, "fp16": False, "use_vllm": False, **keys}
    assert str(arguments.packed_in(SimpleNamespace(fsdp=True, **given))) == f"torch.{dtype}"
    assert arguments.packed_in(SimpleNamespace(fsdp=[], **given)) is None
    assert arguments.packed_in(SimpleNamespace(fsdp=True, **{**given, "use_vllm": True})) is None
