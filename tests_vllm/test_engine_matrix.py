"""Engine and trainer agree before and after optimizer steps: every architecture, kind of training and way to sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests_vllm.scoring import apart_nats
from tests_vllm.test_engine_sync import (
    EXACT,
    VISIBLE,
    WAYS,
    Rows,
    Trainers,
    adapter,
    four_bits,
    trained,
    unlocked,  # noqa: F401 - a fixture
)

KINDS = {"qwen2_5_vl": "picture_rows", "qwen3_vl": "picture_rows", "qwen3": "text_rows", "llama": "text_rows"}
TRAINING = {"lora": WAYS, "qlora": ("batched", "adapter"), "full": ("merged", "batched")}
"""Kind of training -> the ways that it allows."""


@pytest.mark.parametrize(("training", "way"), [(training, way) for training, ways in TRAINING.items() for way in ways])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_the_trainers(
    unlocked: Trainers,  # noqa: F811
    kind: str,
    training: str,
    way: str,
    request: pytest.FixtureRequest,
) -> None:
    rows: Rows = request.getfixturevalue(KINDS[kind])
    settings: dict[str, Any] = {"lora": adapter()}
    if training == "qlora":
        settings |= four_bits()
    if training == "full":
        settings = {"lora": False, "learning_rate": 1e-3}
    trainer = unlocked(kind, rows, way, **settings)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL holds an adapter in bfloat16 beside a base in 4 bits
            parameter.data = parameter.data.float()
    trainer.model.train()  # in evaluation bitsandbytes packs 64 columns at a time for the CPU, and these layers have 96
    trainer.vllm_generation.sync_weights()
    images = [rows[0]["image"], rows[1]["image"]] if "image" in rows[0] else []
    assert apart_nats(trainer, images) <= EXACT, "before the first step"
    compared = trained(trainer, rows)
    assert len(compared.synced) == 3 and min(compared.stale) > VISIBLE
    assert max(compared.synced) <= EXACT
    assert training != "qlora" or not any(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
