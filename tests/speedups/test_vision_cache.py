"""Features of a frozen tower kept: the same values and gradients, and the tower runs once on each distinct image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import DEVICE, EXACT, SAME, make_trainer

from grpo_autotune.speedups.images import vision_cache  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip

GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.05, "max_steps": 5}


def tower_of(trainer):
    return next(vision_cache._towers(trainer.model))


def freeze(trainer):
    for weight in tower_of(trainer).parameters():
        weight.requires_grad_(False)


@pytest.fixture
def varied_rows(picture_rows):
    """Two sizes; two rows of the same size that differ in one pixel."""
    rows = [dict(row) for row in picture_rows]
    rows[1]["image"] = rows[0]["image"].copy()
    rows[1]["image"].putpixel((3, 3), (255, 0, 0))
    rows[2]["image"] = Image.new("RGB", (112, 56), (10, 200, 30))
    return rows


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("lora", "grpo"),
    [(True, {}), (False, {}), (False, {"gradient_checkpointing": False, "num_iterations": 2})],
    ids=["lora", "full", "full without checkpointing"],
)
def test_training_is_the_same(tiny, tmp_path, varied_rows, kind, lora, grpo):
    settings = {"lora": lora, "change": None if lora else freeze, **GROUPS, **grpo}
    plain, _ = trained("none", tiny(kind), varied_rows, tmp_path, **settings)
    mine, speedups = trained("vision_cache", tiny(kind), varied_rows, tmp_path, **settings)
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) < SAME
    facts = speedups.facts()["vision_cache"]
    towers = 1 if lora else 2
    assert facts["computed"] == 4 * towers, "four distinct images, in each of the towers"
    assert facts["asked"] > 10 * facts["computed"]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("names", ["vision_cache", "auto"])
def test_the_tower_runs_on_new_images_and_in_the_self_check_alone(tiny, tmp_path, varied_rows, kind, names):
    """Whatever other speed-ups send through the model."""
    trainer = make_trainer(tiny(kind), varied_rows, tmp_path, lora=True, **GROUPS)
    runs: list[int] = []
    tower_of(trainer).blocks[0].register_forward_pre_hook(lambda block, inputs: runs.append(trainer.state.global_step))
    speedups = speed_up(trainer, names if names == "auto" else [names])
    trainer.train()
    facts = speedups.facts()["vision_cache"]
    assert all(row.on for row in speedups.table() if row.name in ("vision_cache", "shared_prefix")) or names != "auto"
    assert facts["computed"] == 4
    assert len(runs) <= 4 + 1, "at most once for each image, and once for the check"


def test_features_are_those_of_the_tower(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path)
    tower = tower_of(trainer)
    size = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4], [1, 4, 4]], device=DEVICE)
    patches = torch.randn(16 * 3 + 8, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    patches[24:40] = patches[:16]
    patches[40:] = patches[:16].flip(1)  # the same sum, other pixels
    with torch.no_grad():
        plain = tower(patches, grid_thw=grid, return_dict=True)
        speedups = speed_up(trainer, ["vision_cache"])
        found = [tower(patches, grid_thw=grid, return_dict=True) for _ in range(2)]
    for output in found:
        assert type(output) is type(plain) and output.keys() == plain.keys()
        for name, value in plain.items():
            pairs = zip(output[name], value, strict=True) if isinstance(value, list) else [(output[name], value)]
            for mine, theirs in pairs:
                assert float((mine - theirs).abs().max()) < EXACT
    assert speedups.facts()["vision_cache"]["computed"] == 3


def test_new_weights_make_new_features(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path)
    speedups = speed_up(trainer, ["vision_cache"])
    tower = tower_of(trainer)
    size = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    call = {"grid_thw": torch.tensor([[1, 4, 4]], device=DEVICE), "return_dict": True}
    patches = torch.randn(16, size, device=DEVICE)
    before = tower(patches, **call).pooler_output
    tower.load_state_dict({name: value * 1.5 for name, value in tower.state_dict().items()})
    after = tower(patches, **call).pooler_output
    assert not torch.allclose(before, after)
    speedups.remove()
    assert torch.allclose(tower(patches, **call).pooler_output, after, atol=EXACT)


def test_it_forgets_within_its_memory(tiny, tmp_path, varied_rows, monkeypatch):
    monkeypatch.setattr(vision_cache, "LIMIT_BYTES", 40_000)
    mine, speedups = trained("vision_cache", tiny("qwen3_vl"), varied_rows, tmp_path, **GROUPS)
    facts = speedups.facts()["vision_cache"]
    assert facts["kept_bytes"] <= 40_000 and facts["computed"] > 4
    assert mine.state.global_step == 5


def test_a_tower_that_mixes_images_is_noticed(tiny, tmp_path, varied_rows, monkeypatch, caplog):
    def change(trainer):
        merger = tower_of(trainer).merger
        merger.register_forward_hook(lambda module, args, output: output + args[0].mean() * len(output))

    trainer, _ = trained("vision_cache", tiny("qwen3_vl"), varied_rows, tmp_path, change=change, **GROUPS)
    assert "speed-up vision_cache is off" in caplog.text and trainer.state.global_step == 5


def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, picture_rows):
    def reason(trainer):
        row = next(row for row in speed_up(trainer, ["vision_cache"]).table() if row.name == "vision_cache")
        assert not row.on
        return row.reason

    assert "model.name_or_path" in reason(make_trainer(tiny("llama"), text_rows, tmp_path))
    assert "model.freeze_vision_tower" in reason(make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, lora=False))


def test_removal_leaves_nothing(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen2_5_vl"), picture_rows, tmp_path)
    before = patched(trainer)
    speedups = speed_up(trainer, ["vision_cache"])
    assert patched(trainer) != before
    speedups.remove()
    assert patched(trainer) == before
