"""A whole micro step with the speed-ups against the plain one: what is found, what is taken off, and what stays."""

from __future__ import annotations

import random
import re
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from grpo_autotune.hardware import versions
from grpo_autotune.hardware.seeded import random_streams
from grpo_autotune.seams import ranks
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import foreign_code
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.speedups.selfcheck import SelfCheck
from grpo_autotune.speedups.step_check import State, StepCheck
from tests.support.pairs import gap, weights_of
from tests.support.trainers import GRPOTrainer, make_trainer
from tests.support.wrong_speedups import FAILING, WRONG

BATCH = {"num_generations": 4, "gradient_accumulation_steps": 4, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}


class Theirs(GRPOTrainer):
    """A trainer with one method of its own, which changes nothing."""

    def _get_train_sampler(self, dataset=None):
        return super()._get_train_sampler(dataset)


def train(tiny, tmp_path, rows, names, cls=GRPOTrainer, check="auto", **grpo):
    trainer = make_trainer(tiny("qwen3"), rows, tmp_path, **{**BATCH, **grpo})
    trainer.__class__ = cls
    speedups = speed_up(trainer, names, check=check)
    trainer.train()
    return weights_of(trainer), {row.name: row for row in speedups.table() if row.reason != "not asked for"}, trainer


@pytest.mark.parametrize(
    ("names", "cls", "check", "trl"),
    [
        ([WRONG, "merge_passes", "shared_prefix"], Theirs, "auto", ""),
        ([WRONG], GRPOTrainer, "always", ""),
        ([WRONG, "merge_passes", "shared_prefix"], GRPOTrainer, "auto", "1.16.9"),
    ],
    ids=["in a window of a subclass", "always", "a TRL that was not tried"],
)
def test_what_is_wrong_in_a_micro_step_is_taken_off_by_name_and_the_rest_stays(
    tiny, tmp_path, text_rows, names, cls, check, trl, monkeypatch
):
    plain, _, plain_trainer = train(tiny, tmp_path, text_rows, "none")
    if trl:
        monkeypatch.setattr(versions, "package_version", {"trl": trl}.get)
    mine, table, trainer = train(tiny, tmp_path, text_rows, names, cls, check)
    assert {name for name, row in table.items() if not row.on} == {WRONG}
    found = re.search(r"its self-check found a micro step's loss, .* off by (\S+) \(", table[WRONG].reason)
    assert found and 5e-3 < float(found[1]) < 1.1e-2
    assert gap(mine, plain) < 1e-6 and trainer._step == plain_trainer._step
    for mine_line, line in zip(trainer.state.log_history[:-1], plain_trainer.state.log_history[:-1], strict=True):
        assert mine_line["entropy"] == pytest.approx(line["entropy"]) and mine_line["reward"] == line["reward"]


def test_what_ends_with_an_error_is_taken_off_by_name(tiny, tmp_path, text_rows):
    plain, _, _ = train(tiny, tmp_path, text_rows, "none")
    mine, table, _ = train(tiny, tmp_path, text_rows, [FAILING, "shared_prefix"], check="always")
    assert {name for name, row in table.items() if not row.on} == {FAILING} and "no gradient" in table[FAILING].reason
    assert gap(mine, plain) < 1e-6


def test_speed_ups_that_are_right_stay_on(tiny, tmp_path, text_rows):
    names = ["merge_passes", "shared_prefix", "skip_dead"]
    plain, _, plain_trainer = train(tiny, tmp_path, text_rows, "none")
    mine, table, trainer = train(tiny, tmp_path, text_rows, names, check="always")
    assert all(row.on for row in table.values())
    assert gap(mine, plain) < 1e-6 and trainer._step == plain_trainer._step


def test_each_kind_is_compared_once_whatever_stands_beside_it_in_a_window(tiny, tmp_path, text_rows, monkeypatch):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    check, compared = StepCheck(trainer, [Installed("any")]), []
    check._merging = SimpleNamespace(held=[])
    monkeypatch.setattr(check, "_compare", lambda window, *rest: compared.append(len(window)))
    trainer.model.train()
    whole = {"completion_mask": torch.ones(2, 3), "advantages": torch.tensor([1.0, -1.0])}
    padded = whole | {"completion_mask": torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])}
    for window in ([padded], [whole], [padded, whole], [whole, padded, padded]):
        check._merging.held = window[:-1]
        check._loss(lambda *given: None, trainer.model, window[-1])
    assert compared == [1, 1]


@pytest.mark.parametrize("passes", [0, 1])
def test_a_rank_that_hears_of_anothers_failure_has_its_gradients_and_hooks(
    tiny, tmp_path, text_rows, monkeypatch, passes
):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
        weight.register_post_accumulate_grad_hook(lambda weight: None)
    before = [(weight.grad, weight._post_accumulate_grad_hooks) for weight in weights]
    good = [None] * passes

    def tell(*told):
        if not good:
            raise torch.OutOfMemoryError("rank 0")
        good.pop()

    monkeypatch.setattr(ranks, "_tell", tell)
    check = StepCheck(trainer, [Installed("any")])
    with pytest.raises(torch.OutOfMemoryError, match="rank 0"):
        check._tried(State([vars(trainer)]), trainer.model, lambda batch: sum(map(torch.sum, weights)), [{}], [])
    for weight, (gradient, hooks) in zip(weights, before, strict=True):
        assert weight.grad is gradient and weight._post_accumulate_grad_hooks is hooks and len(hooks) == 1
    sum(map(torch.sum, weights)).backward()
    assert all(bool((weight.grad == 2).all()) for weight in weights)


def test_somebody_elses_code_is_found_wherever_it_is(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    speed_up(trainer)
    assert foreign_code(trainer) is None
    hook = trainer.model.get_base_model().model.layers[0].register_forward_hook(lambda *given: None)
    assert "a Qwen3DecoderLayer of the model has a hook of" in foreign_code(trainer)
    hook.remove()
    hook = trainer.model.get_base_model().model.norm.register_full_backward_pre_hook(lambda *given: None)
    assert "a Qwen3RMSNorm of the model has a hook of" in foreign_code(trainer)
    hook.remove()
    trainer.data_collator = lambda rows: rows
    assert "`data_collator` was replaced by" in foreign_code(trainer)
    trainer.__class__ = Theirs
    assert foreign_code(trainer) == "Theirs has a `_get_train_sampler` of its own"


@pytest.mark.slow
def test_a_state_puts_back_what_was_done_since():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(module.parameters())
    mean, rows = torch.zeros(2), deque([1, 2], maxlen=2)
    state = {"calls": 1, "metrics": {"train": defaultdict(list, loss=[1.0])}, "rows": rows, "mean": mean}
    state |= {"module": module, "optimizer": optimizer}
    weights = [weight.detach().clone() for weight in module.parameters()]
    inner = state["metrics"]["train"]
    left = nn.Linear(2, 2)
    state["left"] = left
    kept = State([state], [left])
    drawn = (torch.rand(()), random.random(), numpy.random.rand())
    state["calls"], state["new"], state["mean"] = 2, None, torch.ones(2)
    state["metrics"]["train"]["loss"].append(2.0)
    state["metrics"]["train"]["kl"].append(2.0)
    rows.append(3)
    mean += 1.0
    module(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    kept.put_back()
    assert list(state) == ["calls", "metrics", "rows", "mean", "module", "optimizer", "left"] and state["calls"] == 1
    assert state["metrics"]["train"] is inner and dict(inner) == {"loss": [1.0]}
    assert list(rows) == [1, 2] and state["mean"] is mean and mean.tolist() == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), weights, strict=True))
    assert module[1].num_batches_tracked == 0 and not optimizer.state
    assert (torch.rand(()), random.random(), numpy.random.rand()) == drawn
    assert len(kept.weights) == 4


def test_a_self_check_draws_nothing_for_good():
    put_back = random_streams()
    following = torch.rand(())
    put_back()
    check = SelfCheck(Installed("a speed-up"))
    assert not check.run(lambda: torch.rand(2), lambda: torch.rand(2), torch.float32, "values")
    assert torch.rand(()) == following
