"""Speed-ups against plain TRL on a GPU: greedy tokens, log-probs, loss and every gradient, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.speedups.selection import OPTIONS
from tests.support.exactness import differences, ready

import torch  # isort: skip

EXACT = 1e-4
"""Relative. Kernels of other shapes add in another order, and on a GPU more of them are in play than on a CPU."""
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
FORMS = [[{"name": "shared_prefix", "form": form}] for form in OPTIONS["shared_prefix"]["form"]]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
@pytest.mark.parametrize("names", ["auto", *FORMS], ids=lambda names: "auto" if names == "auto" else names[0]["form"])
def test_exact(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    picture_rows: list[dict[str, Any]],
    text_rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    names: Any,
    kind: str,
    checkpointing: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    greedy = {"generation_kwargs": {"do_sample": False}, "beta": 0.05, "num_iterations": 2}

    def build() -> Any:
        rows = picture_rows if kind.endswith("vl") else text_rows
        trainer = ready(
            tiny(kind), rows, tmp_path, use_cpu=False, gradient_checkpointing=checkpointing, **greedy, **GROUPS
        )
        assert trainer.accelerator.device.type == "cuda"
        return trainer

    found = differences(build, names)
    compared = {key: difference for key, difference in found.items() if not key.startswith("fact.")}
    assert compared.keys() >= {"completion_ids", "ref_per_token_logps", "old_per_token_logps", "loss", "gradients"}
    assert compared.pop("completion_ids") == 0.0
    assert {key: difference for key, difference in compared.items() if difference > EXACT} == {}
    assert found["fact.plain_passes"] == 0
    assert found["fact.tokens"] < found["fact.tokens_of_plain"]
