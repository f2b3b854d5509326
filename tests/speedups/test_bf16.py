"""Speed-ups under autocast to bfloat16: as near to float32 as plain TRL is, on the batch that plain TRL generated.

The benchmark's `bf16` part measures more batches and both settings of everything; here each architecture has one row.
"""

from __future__ import annotations

import statistics

import pytest

from tests.support.exactness import ready, under_autocast
from tests.support.exactness_ranks import rows_of
from tests.support.trainers import make_trainer

from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.shared_prefix import speedup  # isort: skip

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
AGAIN = 1.6
"""Two orders of rounded sums are further apart than one of them is from float32: by 1.4 where they have nothing in
common, and largest differences scatter."""


@pytest.mark.parametrize(
    ("kind", "lora", "checkpointing"),
    [("qwen2_5_vl", True, False), ("qwen3_vl", False, True), ("qwen3", True, True), ("llama", False, False)],
)
def test_no_further_off_than_rounding(tiny, tmp_path, kind, lora, checkpointing):
    def build(autocast):
        return ready(
            tiny(kind),
            rows_of("picture" if kind.endswith("vl") else "text"),
            tmp_path,
            lora=lora,
            gradient_checkpointing=checkpointing,
            beta=0.05,
            num_iterations=2,  # so that there is an old-policy pass
            bf16=autocast,
            **GROUPS,
        )

    found = under_autocast(build, ["auto"], batches=5)["auto"]
    for what in ("log_probs", "gradients"):
        fast, plain, from_float32 = (
            statistics.median(each[what] for each in kinds) for kinds in zip(*found, strict=True)
        )
        assert plain > 2e-4, "autocast was not on"
        assert 0.0 < fast <= AGAIN * plain, what
        assert from_float32 <= AGAIN * plain, what
    # a loss is one number, which rounding may leave nearly as it was
    assert max(batch.fast["loss"] for batch in found) <= 0.03


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3"])
@pytest.mark.parametrize("off", [0, 1])
def test_a_position_that_is_off_by_one_is_noticed_under_autocast(tiny, tmp_path, monkeypatch, kind, off):
    positions = speedup._positions

    def shifted(base, batch, layout, images):
        found = positions(base, batch, layout, images).clone()
        for span in layout.spans:
            found[..., span.prompt_end : span.end] += off
        return found

    monkeypatch.setattr(speedup, "_positions", shifted)
    rows = rows_of("picture" if kind.endswith("vl") else "text")
    trainer = make_trainer(tiny(kind), rows, tmp_path, bf16=True, max_steps=1, **GROUPS)
    (row,) = (row for row in speed_up_and_train(trainer).table() if row.name == "shared_prefix")
    assert row.on == (not off), row.reason
    assert not off or "off by" in row.reason


def speed_up_and_train(trainer):
    on = speed_up(trainer, ["shared_prefix"])
    trainer.train()
    return on
