"""Engine and trainer agree before and after optimizer steps: every architecture, kind of training and way to sync.

What a sync sends is held to the parameters that its way is about, and the caches that it empties to what they hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_autotune.rollout.sync import sync
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
    first, *later = sync.facts(trainer)
    named = list(trainer.model.named_parameters())
    whole = {name: p for name, p in named if "lora_" not in name}
    part = {"merged": "", "batched": "base_layer", "adapter": "lora_"}[way]
    sent = whole if way == "merged" or training == "full" else {name: p for name, p in named if part in name}
    resets = ("prefix", "encoder") if any("visual" in name for name in sent) else ("prefix",)
    assert {row.reset for row in later} == {() if way == "adapter" else resets}
    assert {(row.way, row.full, row.tensors) for row in later} == {(way, way == "merged", len(sent))}
    assert first.full and all(row.seconds > 0 for row in later)
    if training != "qlora":  # its base is packed: the bytes sent are not those of its parameters
        assert {row.bytes for row in later} == {sum(p.numel() * 4 for p in sent.values())}
        assert first.bytes >= sum(p.numel() * 4 for p in whole.values())
