"""A speed-up is off where it would stand in for code that is not TRL's, so that what is learned stays the same."""

from __future__ import annotations

import functools
from types import MethodType

import pytest

torch = pytest.importorskip("torch")
from trl import GRPOTrainer  # noqa: E402

from grpo_autotune import speed_up  # noqa: E402
from grpo_autotune.speedups.conditions import LOSS, overridden  # noqa: E402
from tests.support.pairs import gap, weights_of  # noqa: E402
from tests.support.trainers import make_trainer  # noqa: E402

BATCH = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "loss_type": "grpo",
}
GROUPS = ["shared_prefix", "skip_dead", "length_sort"]


def by_length(completion_ids, prompts, **kwargs):
    """Equal for all but the first prompt: the other groups are dead."""
    first = ["0" in prompt[0]["content"] for prompt in prompts]
    return [float(sum(ids) % 7) if living else 1.0 for ids, living in zip(completion_ids, first, strict=True)]


def penalised(original):
    def loss(self, *args, **kwargs):
        pull = sum((weight.float() ** 2).sum() for weight in self.model.parameters() if weight.requires_grad)
        return original(self, *args, **kwargs) + 0.01 * pull

    return loss


def clamped(original):
    @functools.wraps(original)  # which gives it TRL's own name and module
    def logps(self, *args, **kwargs):
        scores = original(self, *args, **kwargs)
        return (torch.clamp(scores[0], min=-6.0), *scores[1:])

    return logps


class Revived(GRPOTrainer):
    """Groups of equal rewards are pushed away from what they said."""

    def _prepare_inputs(self, generation_batch):
        batch = dict(super()._prepare_inputs(generation_batch))
        advantages = batch["advantages"]
        return batch | {"advantages": torch.where(advantages.abs() < 1e-3, -torch.ones_like(advantages), advantages)}


class Halved(GRPOTrainer):
    """Only the better half of a micro batch is trained on."""

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        kept = batch["advantages"].argsort(descending=True)[: len(batch["advantages"]) // 2]
        return {key: value[kept] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}


class Mine(Halved):
    """A subclass of a subclass, with nothing of its own."""


def subclass(cls):
    def change(trainer, monkeypatch):
        trainer.__class__ = cls

    return change


def on_class(method, wrapper):
    def change(trainer, monkeypatch):
        monkeypatch.setattr(GRPOTrainer, method, wrapper(getattr(GRPOTrainer, method)))

    return change


def on_trainer(method, wrapper):
    def change(trainer, monkeypatch):
        setattr(trainer, method, MethodType(wrapper(getattr(GRPOTrainer, method)), trainer))

    return change


LOGPS = "_get_per_token_logps_and_entropies"
LOSS_OFF, ROWS_OFF = {"skip_dead", "length_sort"}, {"length_sort"}
CHANGES = {
    "a loss on the class": (on_class("compute_loss", penalised), LOSS_OFF),
    "TRL's inner loss on the class": (on_class("_compute_loss", penalised), LOSS_OFF),
    "a loss on the trainer": (on_trainer("compute_loss", penalised), LOSS_OFF),
    "log-probs on the class": (on_class(LOGPS, clamped), {"shared_prefix"}),
    "log-probs on the trainer": (on_trainer(LOGPS, clamped), {"shared_prefix"}),
    "revived groups": (subclass(Revived), ROWS_OFF),
    "rows left out": (subclass(Mine), ROWS_OFF),
}
"""What is changed, and the speed-ups that it turns off."""


@pytest.mark.parametrize("late", [False, True], ids=["before", "after speed_up"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_somebody_changed_is_learned_as_without_speed_ups(tiny, tmp_path, text_rows, monkeypatch, what, late):
    change, off = CHANGES[what]

    def run(names):
        with monkeypatch.context() as patch:
            trainer = make_trainer(
                tiny("qwen3"), text_rows, tmp_path, optim="sgd", learning_rate=0.05, rewards=[by_length], **BATCH
            )
            if not late:
                change(trainer, patch)
            speedups = speed_up(trainer, names)
            if late:
                change(trainer, patch)
            trainer.train()
            return weights_of(trainer), {row.name for row in speedups.table() if row.on}

    (plain, _), (mine, on) = run("none"), run(GROUPS)
    assert gap(mine, plain) < 1e-6
    assert on == set(GROUPS) - off


@pytest.mark.parametrize("method", LOSS)
def test_a_wrapper_that_bears_trls_name_is_told_apart(tiny, tmp_path, text_rows, monkeypatch, method):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert overridden(trainer, LOSS) is None
    monkeypatch.setattr(GRPOTrainer, method, functools.wraps(getattr(GRPOTrainer, method))(lambda self: None))
    reason = overridden(trainer, LOSS)
    assert reason is not None and f"GRPOTrainer's `{method}` was replaced by" in reason and __name__ in reason


def test_a_forward_of_another_library_is_told_apart(tiny, tmp_path, text_rows, monkeypatch):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert overridden(trainer, ("model.forward", "model.generate")) is None
    base = type(trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model)
    plain = base.forward
    monkeypatch.setattr(base, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs))
    speedups = speed_up(trainer, ["shared_prefix"])
    (row,) = [row for row in speedups.table() if row.name == "shared_prefix"]
    assert not row.on and "`forward` was replaced by" in row.reason
