"""DeepSpeed's keys against those of `grpo`, as transformers compares them: one line before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from trl import GRPOConfig

from grpo_autotune.config.zero import ZERO, deepspeed_keys
from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.train.arguments import check_deepspeed, check_host_optimizer


def arguments(folder: Path, optim: str = "adamw_torch", **keys: Any) -> Any:
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "use_cpu": True, "bf16": False, "optim": optim}
    return GRPOConfig(output_dir=str(folder), deepspeed=deepspeed_keys(keys), **settings)


def plugin(folder: Path, **keys: Any) -> Any:
    return arguments(folder, **keys).deepspeed_plugin


@pytest.mark.parametrize("name", ZERO)
def test_every_name_passes(name: str, tmp_path: Path) -> None:
    made = plugin(tmp_path, name=name, offload="cpu")
    check_deepspeed(made)
    assert made.zero_stage == int(name[-1]) and made.offload_optimizer_device == "cpu"
    assert made.hf_ds_config.config["train_micro_batch_size_per_gpu"] == 2
    assert made.zero3_init_flag == (name == "zero3"), "each rank loads its part"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu: differs from grpo.per_device_train"),
        ({"gradient_clipping": 0.3}, "gradient_clipping: differs from grpo.max_grad_norm"),
        ({"train_batch_size": 64}, "train_batch_size: differs from grpo.train_batch_size"),
        (
            {"zero_optimization": {"redoce_bucket_size": 7}},
            "redoce_bucket_size: unknown key. Nearest known key: reduce_",
        ),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, "overlap_comm: 'maybe' is not accepted"),
    ],
)
def test_keys_that_contradict_are_one_line(keys: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(plugin(tmp_path, name="zero2", **keys))
    assert str(caught.value).startswith("grpo.deepspeed.") and told in str(caught.value)


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "lion_32bit"])
def test_an_optimizer_in_whose_place_offload_puts_another_is_refused(tmp_path: Path, optim: str) -> None:
    offloaded = {"name": "zero2", "offload": "cpu"}
    with pytest.raises(
        ConfigError, match=r"^grpo\.optim: accelerate would put an optimizer of DeepSpeed's in the place of"
    ):
        check_host_optimizer(arguments(tmp_path, optim, **offloaded))
    check_host_optimizer(arguments(tmp_path, "sgd", **offloaded, zero_force_ds_cpu_optimizer=False))
    check_host_optimizer(arguments(tmp_path, "sgd", name="zero2"))
    check_host_optimizer(arguments(tmp_path, "sgd", **offloaded, optimizer={"type": "AdamW", "params": TORCHS}))


TORCHS = {"torch_adam": True}


@pytest.mark.parametrize(
    ("optim", "optimizer", "told"),
    [
        ("adamw_torch", None, "Adam"),
        ("sgd", {"type": "AdamW"}, "Adam"),
        ("sgd", {"type": "Lion"}, "Lion"),
        ("sgd", {"type": "Muon"}, "Adam"),
        ("sgd", {"type": "Adagrad", "params": {}}, "Adagrad"),
    ],
)
def test_an_optimizer_for_the_host_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, optimizer: dict[str, Any] | None, told: str
) -> None:
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    keys = {"optimizer": optimizer} if optimizer else {}
    with pytest.raises(
        EnvironmentProblem, match=f"DeepSpeed's {told} for the host cannot be compiled here: "
    ) as caught:
        check_host_optimizer(arguments(tmp_path, optim, name="zero2", offload="cpu", **keys))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
