"""Conditions that several speed-ups share: noise, and a model whose modules are not called on themselves."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
from torch import nn

from grpo_autotune.speedups.conditions import active_dropout
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.speedups.selection import Selection, load
from tests.support.trainers import make_trainer

SKIPPING = ("shared_prefix", "shared_prefill", "vision_cache", "skip_dead")
"""Speed-ups by which a rank may leave out modules that another rank runs."""


def parallel(fsdp=None, stage=None):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return {
        "is_fsdp_enabled": fsdp is not None,
        "accelerator": SimpleNamespace(
            is_fsdp2=fsdp == 2, num_processes=2, state=SimpleNamespace(deepspeed_plugin=plugin)
        ),
    }


@pytest.fixture
def refusals(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, beta=0.0)

    def refusals(gpus=1, **state):
        args = SimpleNamespace(n_gpu=gpus, **vars(trainer.args))
        stand_in = SimpleNamespace(**{**vars(trainer), **parallel(**state), "args": args})
        return {name: load(Selection(name)).applies(stand_in) for name in (*SKIPPING, "patch_embed")}

    return refusals


def test_weights_of_fsdp_1_are_no_layer_s_own(refusals):
    reasons = refusals(fsdp=1)
    assert all("version: 2" in reasons[name] for name in SKIPPING), reasons
    assert reasons["patch_embed"] is None, "it runs the same module, in another way"


@pytest.mark.parametrize("state", [{}, {"stage": 1}, {"stage": 2}, {"stage": 3}, {"fsdp": 2}])
def test_models_are_sped_up_whole_and_sharded(refusals, state):
    assert not any(refusals(**state).values())


def test_no_layer_is_put_on_modules_that_are_copied_to_other_gpus(refusals):
    reasons = refusals(gpus=2)
    for name in ("shared_prefix", "vision_cache", "skip_dead", "patch_embed"):
        assert "one process per GPU" in reasons[name]


def test_noise_on_embeddings_is_drawn_anew_for_each_row(tiny, tmp_path, text_rows):
    batch = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, neftune_noise_alpha=5.0, **batch)
    reasons = {row.name: row.reason for row in speed_up(trainer).table() if not row.on}
    by_row = {"shared_prefix", "shared_prefill", "length_sort", "skip_dead", "merge_passes"}
    assert {name for name, reason in reasons.items() if "grpo.neftune_noise_alpha is 5" in reason} == by_row


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoHaConfig(rank_dropout=0.1),
        peft.LoKrConfig(module_dropout=0.1),
        peft.OFTConfig(module_dropout=0.1, oft_block_size=8),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_what_adapters_drop_without_torch_s_dropout_is_seen(adapter):
    adapter.target_modules = ["0"]
    assert active_dropout(nn.Sequential(nn.Linear(8, 8))) is None
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), adapter)
    assert (active_dropout(model) or "").endswith("is 0.1")
