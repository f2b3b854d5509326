"""The patch embedding as a matrix product: same values, same gradients, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import DEVICE, SAME, make_trainer

from grpo_autotune.speedups.install import speed_up  # isort: skip


def convolution(trainer):
    return next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Conv3d))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_same_values_and_gradients(tiny, tmp_path, picture_rows, kind):
    trainer = make_trainer(tiny(kind), picture_rows, tmp_path, lora=False)
    layer = convolution(trainer)
    shape = (5, layer.in_channels, *layer.kernel_size)

    def run() -> list[torch.Tensor]:
        patches = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        layer.zero_grad()
        out = layer(patches)
        out.square().sum().backward()
        return [out.detach(), patches.grad, *(weight.grad.clone() for weight in layer.parameters())]

    before = patched(trainer)
    plain = run()
    speedups = speed_up(trainer, ["patch_embed"])
    assert "forward" in vars(layer), "the layer is on"
    for mine, theirs in zip(run(), plain, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).norm() / theirs.norm()) < SAME
    assert next(row for row in speedups.table() if row.name == "patch_embed").on
    speedups.remove()
    assert patched(trainer) == before


def test_training_is_the_same(tiny, tmp_path, picture_rows):
    def train(names):
        trainer, _ = trained(names, tiny("qwen3_vl"), picture_rows, tmp_path, lora=False, max_steps=5)
        return rewards_of(trainer), weights_of(trainer)

    (plain_rewards, plain), (rewards, mine) = train("none"), train("patch_embed")
    assert rewards == plain_rewards
    assert gap(mine, plain) < SAME


def test_a_wrong_product_is_noticed_and_left_to_the_convolution(tiny, tmp_path, picture_rows, caplog):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path)
    speedups = speed_up(trainer, ["patch_embed"])
    layer = convolution(trainer)
    patches = torch.randn(3, layer.in_channels, *layer.kernel_size, device=DEVICE)
    layer.dilation = (1, 1, 1)
    wanted = torch.nn.functional.conv3d(patches, layer.weight, layer.bias, layer.stride) + 1.0
    layer._conv_forward = lambda *args: wanted  # a convolution that is none
    assert torch.equal(layer(patches), wanted)
    assert "speed-up patch_embed is off" in caplog.text
    assert not next(row for row in speedups.table() if row.name == "patch_embed").on


def test_it_says_where_there_is_no_such_convolution(tiny, tmp_path, text_rows):
    table = speed_up(make_trainer(tiny("qwen3"), text_rows, tmp_path), ["patch_embed"]).table()
    row = next(row for row in table if row.name == "patch_embed")
    assert not row.on and "model.name_or_path" in row.reason
