"""shared_prefix with LoRA's dropout, one mask for the prompt of a group: equal to plain TRL in the mean over seeds."""

from __future__ import annotations

from functools import reduce

import pytest

from tests.support.exactness import apart, generation, loss_and_gradients, ready

from grpo_autotune.speedups.install import speed_up  # isort: skip
import torch  # isort: skip
from peft import LoraConfig  # isort: skip

SHARED = [{"name": "shared_prefix", "dropout": "shared"}]
LAYER = "model base_model model model layers 0"
SEEDS = 100
BOUND = 4.0  # of 24 |z|: 0.2 % of draws exceed it (Bonferroni); without dropout on the prompt it is above 7


def build(tiny, tmp_path, rows, *, rate: float = 0.3, **grpo):
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=rate)
    groups = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return ready(tiny("llama"), rows, tmp_path, lora=adapter, spread=0.4, num_iterations=2, **{**groups, **grpo})


def row_of(trainer, names):
    installed = speed_up(trainer, names)
    return installed, next(row for row in installed.table() if row.name == "shared_prefix")


def test_it_has_to_be_asked_for(tiny, tmp_path, text_rows):
    for names in ("auto", "shared_prefix", [{"name": "shared_prefix", "form": "split"}]):
        _, row = row_of(build(tiny, tmp_path, text_rows), names)
        assert not row.on and row.reason.startswith("peft.lora_dropout is 0.3")
    installed, row = row_of(trainer := build(tiny, tmp_path, text_rows), SHARED)
    assert row.on and "not exact: one dropout mask for the prompt of a group" in row.reason
    loss_and_gradients(trainer, generation(trainer))
    assert 0.0 < installed.facts()["shared_prefix"]["self_check_difference"] < 1e-5, "nothing is dropped in the check"
    assert "not exact" not in row_of(build(tiny, tmp_path, text_rows, rate=0.0), SHARED)[1].reason


@pytest.mark.parametrize(
    ("grpo", "change", "reason"),
    [
        ({"top_entropy_quantile": 0.5}, None, "grpo.top_entropy_quantile"),
        ({"neftune_noise_alpha": 5.0}, None, "grpo.neftune_noise_alpha is 5"),
        ({}, (f"{LAYER} self_attn", "attention_dropout", 0.1), "the model's attention_dropout is 0.1"),
        ({}, (f"{LAYER} mlp", "act_fn", torch.nn.Dropout(0.2)), "grpo.disable_dropout is false and the dropout of"),
        ({}, ("", "compute_loss", lambda *given: None), "compute_loss"),
    ],
)
def test_noise_that_rows_may_not_share_keeps_it_off_by_name(tiny, tmp_path, text_rows, grpo, change, reason):
    trainer = build(tiny, tmp_path, text_rows, **grpo)
    if change:
        path, name, value = change
        setattr(reduce(getattr, path.split(), trainer), name, value)
    _, row = row_of(trainer, SHARED)
    assert not row.on and reason in row.reason


def test_a_checkpointed_layer_draws_its_masks_again(tiny, tmp_path, text_rows):
    found = []
    for checkpointing in (False, True):
        trainer = build(tiny, tmp_path, text_rows, gradient_checkpointing=checkpointing)
        speed_up(trainer, SHARED)
        batch = generation(trainer)
        torch.manual_seed(1)
        found.append(loss_and_gradients(trainer, batch)[1])
    assert max(apart(found[1][name], found[0][name]) for name in found[0]) < 1e-5


def moments(trainer, batch, seeds) -> torch.Tensor:
    """Per seed: projections of the gradient, each completion's log-prob, and its square."""
    sizes = [weight.numel() for weight in trainer.model.parameters() if weight.requires_grad]
    directions = torch.randn(8, sum(sizes), generator=torch.Generator().manual_seed(3))
    scores, seen, found = trainer._get_per_token_logps_and_entropies, [], []

    def kept(*args, **kwargs):
        seen.append(scores(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", kept)
        for seed in seeds:
            torch.manual_seed(seed)
            _, gradients = loss_and_gradients(trainer, batch)
            logps = (seen.pop()[0].detach() - batch["old_per_token_logps"]).mul(batch["completion_mask"]).sum(dim=1)
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            found.append(torch.cat([directions @ flat, logps, logps.square()]).double())
    return torch.stack(found)


def largest_z(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two means, in standard errors."""
    errors = (one.var(dim=0) / len(one) + other.var(dim=0) / len(other)).sqrt()
    return float(((one.mean(dim=0) - other.mean(dim=0)) / errors).abs().max())


def test_gradients_agree_in_the_mean_over_seeds(tiny, tmp_path, text_rows):
    trainer = build(tiny, tmp_path, text_rows, beta=0.05)
    batch = generation(trainer)
    plain = moments(trainer, batch, range(SEEDS))
    installed = speed_up(trainer, SHARED)
    batch["group_id"] = torch.arange(8) // 4
    shared = moments(trainer, batch, range(1000, 1000 + SEEDS))
    assert installed.facts()["shared_prefix"]["plain_passes"] == 0
    assert largest_z(plain, shared) < BOUND


@pytest.mark.slow
def test_a_whole_micro_step_is_compared_with_nothing_dropped(tiny, tmp_path, text_rows):
    trainer = build(tiny, tmp_path, text_rows, max_steps=1)
    installed = speed_up(trainer, SHARED, check="always")
    trainer.train()
    assert [row.name for row in installed.table() if row.on] == ["shared_prefix"]
