"""Features of a frozen tower kept: the same values and gradients, and the tower runs once on each distinct image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_autotune.estimate.memory import Sizes, memory
from grpo_autotune.estimate.shapes import ModelShape
from tests.estimate.test_cost import run_facts, training
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import DEVICE, EXACT, SAME, make_trainer

from grpo_autotune.seams.layers import AttributeSlot, wrap  # isort: skip
from grpo_autotune.seams.ranks import InStep  # isort: skip
from grpo_autotune.speedups.images import vision_cache  # isort: skip
from grpo_autotune.seams.trainer_access import towers_of  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip

GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.05, "max_steps": 5}


class Reads(TorchDispatchMode):
    """Counts the reads of single numbers, each of which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def tower_of(trainer):
    return next(towers_of(trainer.model))


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
    first = tower_of(trainer).blocks[0]

    def count(call_next, *args, **kwargs):
        runs.append(trainer.state.global_step)
        return call_next(*args, **kwargs)

    # a hook would be somebody else's code, and have steps checked
    handle = wrap(AttributeSlot(first, "forward"), count)
    speedups = speed_up(trainer, names if names == "auto" else [names])
    trainer.train()
    handle.remove()
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


@pytest.mark.parametrize("on_device", [False, True])
def test_pixels_anywhere_make_another_hash(monkeypatch, on_device):
    """Of equal sums, of moved rows and columns, of the least bit; the same in any company, and in half precision."""
    monkeypatch.setattr(vision_cache, "waits", lambda device: on_device)
    hashed = vision_cache._Hash()
    patches = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        image = patches.to(dtype)
        least = image.clone()
        least[47, 23] = torch.nextafter(least[47, 23].float(), torch.tensor(9.0)) if dtype == torch.float32 else 9.0
        others = [least, image.flip(0), image.flip(1), image.roll(1, 1), image[[1, 0, *range(2, 48)]], -image]
        assert len({*hashed.of([image, *others])}) == 1 + len(others)
        before = hashed.of([image])
        hashed.of([torch.zeros(400, 96, dtype=dtype)])  # its factors are more now
        assert hashed.of([image.clone().requires_grad_()]) == before


@pytest.mark.parametrize("on_device", [False, True])
def test_a_call_waits_for_one_read_of_its_hashes(tiny, tmp_path, picture_rows, monkeypatch, on_device):
    monkeypatch.setattr(vision_cache, "waits", lambda device: on_device)
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path)
    speed_up(trainer, ["vision_cache"])
    tower = tower_of(trainer)
    size = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    call = {"grid_thw": torch.tensor([[1, 4, 4]] * 3), "return_dict": True}
    patches = torch.randn(48, size)
    with torch.no_grad():
        tower(patches, **call)
        with Reads() as reads:
            tower(patches, **call)
    assert reads.count == 0, "tensors are read as lists, of all images at once"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_estimate_knows_the_memory_of_features(tiny, tmp_path, picture_rows, kind):
    trainer = make_trainer(tiny(kind), picture_rows, tmp_path)
    speedups, tower = speed_up(trainer, ["vision_cache"]), tower_of(trainer)
    size = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    with torch.no_grad():
        tower(torch.randn(3 * 16, size), grid_thw=torch.tensor([[1, 4, 4]] * 3), return_dict=True)
    shape = ModelShape.from_config(trainer.model.config.to_dict())
    for limit, expected in ((1e9, speedups.facts()["vision_cache"]["kept_bytes"]), (7.0, 7.0)):
        sizes = Sizes(10.0, 10.0, 4.0, kept_images=3, feature_limit=limit)
        assert memory(shape, run_facts(shape, training=training(shape)), sizes).features == expected


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
    monkeypatch.setattr(vision_cache, "LIMIT_BYTES", 20_000)
    mine, speedups = trained("vision_cache", tiny("qwen3_vl"), varied_rows, tmp_path, **GROUPS)
    facts = speedups.facts()["vision_cache"]
    assert facts["kept_bytes"] <= 20_000 and facts["computed"] > 4
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


def test_a_tower_runs_where_another_rank_has_to(tiny, tmp_path, picture_rows, monkeypatch):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path)
    others = [False]
    monkeypatch.setattr(InStep, "any", lambda ranks, flag: flag or others[0])
    runs = []
    tower = tower_of(trainer)
    handle = wrap(AttributeSlot(tower.blocks[0], "forward"), lambda call, *a, **k: (runs.append(1), call(*a, **k))[1])
    speedups = speed_up(trainer, ["vision_cache"])
    size = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    patches, call = torch.randn(16, size), {"grid_thw": torch.tensor([[1, 4, 4]]), "return_dict": True}
    with torch.no_grad():
        first = tower(patches, **call).pooler_output
        before = len(runs)
        assert torch.equal(tower(patches, **call).pooler_output, first) and len(runs) == before
        others[0] = True
        assert torch.equal(tower(patches, **call).pooler_output, first) and len(runs) == before + 1
    assert not [row for row in speedups.table() if row.name == "vision_cache" and not row.on]
    handle.remove()
