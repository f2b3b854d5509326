"""DeepSpeed's keys against those of `grpo`, as transformers compares them: one line before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from grpo_autotune.config.zero import ZERO, deepspeed_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.train.arguments import check_deepspeed


def plugin(folder: Path, **keys: Any) -> Any:
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "use_cpu": True, "bf16": False}
    return GRPOConfig(output_dir=str(folder), deepspeed=deepspeed_keys(keys), **settings).deepspeed_plugin


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
