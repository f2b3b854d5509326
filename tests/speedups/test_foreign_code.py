"""A speed-up is off where it would stand in for code that is not TRL's, so that what is learned stays the same."""

from __future__ import annotations

import functools
from types import MethodType

import pytest

torch = pytest.importorskip("torch")
from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from grpo_autotune import speed_up  # noqa: E402
from grpo_autotune.seams.trainer_access import base_of  # noqa: E402
from grpo_autotune.speedups.base import Installed  # noqa: E402
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


def around_trainers_own(method, wrapper):
    """As a decorator does it, with the names and the marks of what the trainer has."""

    def change(trainer, monkeypatch):
        own = getattr(trainer, method)
        changed = functools.partial(wrapper(lambda self, *args, **kwargs: own(*args, **kwargs)), trainer)
        setattr(trainer, method, functools.wraps(own)(lambda *args, **kwargs: changed(*args, **kwargs)))

    return change


LOGPS = "_get_per_token_logps_and_entropies"
LOSS_OFF, ROWS_OFF = {"skip_dead", "length_sort"}, {"length_sort"}
CHANGES = {
    "a loss on the class": (on_class("compute_loss", penalised), LOSS_OFF),
    "TRL's inner loss on the class": (on_class("_compute_loss", penalised), LOSS_OFF),
    "a loss on the trainer": (on_trainer("compute_loss", penalised), LOSS_OFF),
    "a loss around the trainer's own": (around_trainers_own("compute_loss", penalised), LOSS_OFF),
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


def test_hooks_of_accelerate_are_no_foreign_forward(tiny, tmp_path, text_rows):
    """It puts them on a model that lies on several devices, as a partial function."""
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    base = base_of(trainer.model)
    add_hook_to_module(base, ModelHook())
    assert overridden(trainer, ("model.forward",)) is None
    base.forward = functools.partial(penalised(base.forward), trainer)
    assert "`forward` was replaced by" in overridden(trainer, ("model.forward",))


def test_generate_of_the_model_with_its_adapters_is_asked(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert base_of(trainer.model) is not trainer.model
    own = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    rows = {row.name: row for row in speed_up(trainer, ["shared_prefill", "merge_for_generation"]).table()}
    for name in ("shared_prefill", "merge_for_generation"):
        assert not rows[name].on and "`generate` was replaced by" in rows[name].reason


class Own:
    """Somebody's own speed-up."""

    name, summary, stands_for = "own", "does nothing", ("_clip_grad_norm",)

    def applies(self, trainer):
        return None

    def install(self, trainer):
        return Installed(self.name)


def test_a_method_of_somebodys_own_speed_up_is_asked_again_when_training_begins(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **{**BATCH, "max_steps": 1})
    name = f"{__name__}:Own"
    speedups = speed_up(trainer, [name])
    own = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda *args, **kwargs: own(*args, **kwargs)
    trainer.train()
    row = next(row for row in speedups.table() if row.name == name)
    assert not row.on and "`_clip_grad_norm` was replaced by" in row.reason


class Doubled(GRPOTrainer):
    """Every row is trained on twice."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {key: torch.cat([value] * 2) if getattr(value, "ndim", 0) else value for key, value in output.items()}


def test_somebodys_own_scoring_may_return_more_rows(tiny, tmp_path, text_rows):
    half_groups = {**BATCH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **half_groups)
    trainer.__class__ = Doubled
    speedups = speed_up(trainer)
    trainer.train()
    assert {row.name for row in speedups.table() if row.on} == {"merge_passes"}
