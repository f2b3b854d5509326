"""shared_prefix against plain TRL on a GPU: log-probs, loss and every gradient, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.exactness import differences, ready

EXACT = 1e-4
"""Relative. Kernels of other shapes add in another order, and on a GPU more of them are in play than on a CPU."""
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
def test_shared_prefix(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    picture_rows: list[dict[str, Any]],
    text_rows: list[dict[str, Any]],
    kind: str,
    checkpointing: bool,
) -> None:
    def build() -> Any:
        rows = picture_rows if kind.endswith("vl") else text_rows
        grpo = {"use_cpu": False, "gradient_checkpointing": checkpointing, "beta": 0.05, "num_iterations": 2}
        trainer = ready(tiny(kind), rows, tmp_path, **grpo, **GROUPS)
        assert trainer.accelerator.device.type == "cuda"
        return trainer

    found = differences(build, "shared_prefix")
    compared = {key: difference for key, difference in found.items() if not key.startswith("fact.")}
    assert compared.keys() >= {"completion_ids", "ref_per_token_logps", "old_per_token_logps", "loss", "gradients"}
    assert compared.pop("completion_ids") == 0.0
    assert {key: difference for key, difference in compared.items() if difference > EXACT} == {}
    assert found["fact.plain_passes"] == 0
    assert found["fact.tokens"] < found["fact.tokens_of_plain"]
