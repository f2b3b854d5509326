"""Dead rows skipped: the same loss, gradients and training; denominators kept; metrics of the rest labelled."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from grpo_autotune.probe.probe import Probe
from grpo_autotune.seams.layers import INNER, AttributeSlot, wrap
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import SAME, make_trainer

from trl import GRPOTrainer  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.batches.skip_dead import _Skipping, living_rows  # isort: skip

BATCH = {"per_device_train_batch_size": 4, "num_generations": 2, "gradient_accumulation_steps": 2, "beta": 0.0}
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def half_dead(completions, **kwargs):
    """Every other group of two has a spread of one."""
    return [float(index % 4 == 0) for index in range(len(completions))]


def all_dead(completions, **kwargs):
    return [1.0] * len(completions)


def losses_and_gradients(trainer):
    """The loss and the gradient's norm of each micro batch of a run, as TRL's own methods see them."""
    seen = []

    def backward(call_next, loss, *args, **kwargs):
        found = call_next(loss, *args, **kwargs)
        gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
        seen.append((float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients]).clone()))
        return found

    wrap(AttributeSlot(trainer.accelerator, "backward"), backward, INNER)
    return seen


def run(tiny, tmp_path, rows, names, kind="qwen3", reward=half_dead, **grpo):
    recorded = []
    trainer, speedups = trained(
        names,
        tiny(kind),
        rows,
        tmp_path,
        change=lambda t: recorded.append(losses_and_gradients(t)),
        rewards=[reward],
        lora=False,
        **{**BATCH, "max_steps": 2, **grpo},
    )
    return trainer, speedups, recorded[0]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_those_of_all_rows(tiny, tmp_path, text_rows, loss_type):
    level = "sequence" if loss_type == "luspo" else "token"
    grpo = {"loss_type": loss_type, "importance_sampling_level": level}
    plain, _, wanted = run(tiny, tmp_path, text_rows, "none", **grpo)
    mine, speedups, found = run(tiny, tmp_path, text_rows, "skip_dead", **grpo)
    assert speedups.facts()["skip_dead"] == {"rows": 16.0, "skipped_rows": 8.0}
    assert rewards_of(mine) == rewards_of(plain)
    for (loss, gradient), (plain_loss, plain_gradient) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(plain_loss, abs=1e-6)
        assert float((gradient - plain_gradient).norm()) <= 1e-6 * max(1.0, float(plain_gradient.norm()))
    assert any(float(gradient.norm()) > 1e-3 for _, gradient in wanted)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llama"])
def test_five_steps_end_in_the_same_weights(tiny, tmp_path, picture_rows, text_rows, kind):
    rows = picture_rows if kind.endswith("vl") else text_rows
    plain, _, _ = run(tiny, tmp_path, rows, "none", kind=kind, max_steps=5)
    mine, speedups, _ = run(tiny, tmp_path, rows, "skip_dead", kind=kind, max_steps=5)
    assert speedups.facts()["skip_dead"]["skipped_rows"] == 20.0
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) < SAME


@pytest.mark.parametrize(
    ("kind", "lora", "tokens"), [("llama", False, 2), ("qwen3_vl", True, 2), ("qwen3_vl", False, None)]
)
def test_a_micro_batch_of_dead_rows_still_runs_one_forward(tiny, tmp_path, text_rows, picture_rows, kind, lora, tokens):
    """Of two tokens, unless the images' own weights are trained; every trained weight gets its zero gradient."""
    shapes, missing = [], []
    rows = picture_rows if kind.endswith("vl") else text_rows
    trainer = make_trainer(tiny(kind), rows, tmp_path, rewards=[all_dead], lora=lora, **BATCH)
    speedups = speed_up(trainer, ["skip_dead"])

    def scored(call_next, model, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return call_next(model, input_ids, *args, **kwargs)

    def backward(call_next, loss, *args, **kwargs):
        call_next(loss, *args, **kwargs)
        missing.extend(name for name, w in trainer.model.named_parameters() if w.requires_grad and w.grad is None)

    wrap(AttributeSlot(trainer, "_get_per_token_logps_and_entropies"), scored, INNER)
    wrap(AttributeSlot(trainer.accelerator, "backward"), backward, INNER)
    before = weights_of(trainer)
    trainer.train()
    assert speedups.facts()["skip_dead"]["skipped_rows"] == 24.0
    assert [rows for rows, _ in shapes] == [1] * 6 and (tokens is None or {width for _, width in shapes} == {tokens})
    assert gap(weights_of(trainer), before) == 0.0
    assert not missing
    assert not any("living/entropy" in line for line in trainer.state.log_history)


def test_masked_completions_are_skipped_whatever_their_reward(tiny, tmp_path, text_rows):
    grpo = {"mask_truncated_completions": True, "max_completion_length": 2}
    counter = itertools.count()

    def alternating(completions, **kwargs):
        return [float(next(counter) % 2) for _ in completions]

    plain, _, _ = run(tiny, tmp_path, text_rows, "none", reward=half_dead, **grpo)
    mine, speedups, _ = run(tiny, tmp_path, text_rows, "skip_dead", reward=half_dead, **grpo)
    assert speedups.facts()["skip_dead"]["skipped_rows"] >= 8
    assert gap(weights_of(mine), weights_of(plain)) < SAME
    _, speedups, _ = run(tiny, tmp_path, text_rows, "skip_dead", reward=alternating, **grpo)
    assert speedups.facts()["skip_dead"]["skipped_rows"] > 0, "truncated ones"


def test_metrics_of_the_loss_are_labelled(tiny, tmp_path, text_rows):
    trainer, _, _ = run(tiny, tmp_path, text_rows, "skip_dead")
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["living/share"] == 0.5 and "living/entropy" in line and "entropy" not in line
    assert {"reward", "completions/mean_length"} <= set(line)


def test_spread_decides_and_rounding_does_not():
    equal = torch.full((8, 1), 0.3)
    assert float(equal.std()) != 0.0 or float((equal - equal.mean()).abs().max()) >= 0.0
    nan = float("nan")
    rewards = torch.cat(
        [equal, torch.tensor([[0.0]] * 7 + [[1e-4]]), torch.tensor([[1.0]] * 4 + [[0.0]] * 3 + [[nan]])]
    )
    living = living_rows(rewards, torch.ones(1), 8)
    assert living.tolist() == [False] * 8 + [True] * 8 + [True] * 7 + [False]


def test_small_rewards_are_rewards():
    """TRL divides by their spread: what is small beside 1 is not small beside the others."""
    rewards = torch.tensor([[0.0], [5e-7], [1000.0], [1000.0001]])
    assert living_rows(rewards, torch.ones(1), 2).all()
    summed = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.7, -0.7], [0.0, 0.0], [1e-6, 0.0], [0.0, 2e-6]])
    assert living_rows(summed, torch.ones(2), 2).tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("trained_part", "whole_prompt"), [("connector", True), ("text_model", False)])
def test_weights_between_images_and_text_are_reached_through_images(trained_part, whole_prompt):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("connector", "text_model")})
    for name, part in model.items():
        part.requires_grad_(name == trained_part)
    assert _Skipping("skip_dead", SimpleNamespace(model=model))._images_train is whole_prompt


def test_weights_of_the_rewards_count():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert living_rows(rewards, torch.tensor([1.0, 1.0]), 2).tolist() == [False, False]
    assert living_rows(rewards, torch.tensor([1.0, 0.5]), 2).tolist() == [True, True]


@pytest.mark.parametrize(
    ("grpo", "key"),
    [
        ({"beta": 0.1}, "grpo.beta"),
        ({"entropy_coef": 0.1}, "grpo.entropy_coef"),
        ({"top_entropy_quantile": 0.5}, "grpo.top_entropy_quantile"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "grpo.multi_objective_aggregation"),
    ],
)
def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, grpo, key):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **{**BATCH, **grpo})
    before = patched(trainer)
    speedups = speed_up(trainer, ["skip_dead"])
    row = next(row for row in speedups.table() if row.name == "skip_dead")
    assert not row.on and key in row.reason
    speedups.remove()
    assert patched(trainer) == before


def test_active_dropout_is_named(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)).attention_dropout = 0.1
    row = next(row for row in speed_up(trainer, ["skip_dead"]).table() if row.name == "skip_dead")
    assert not row.on and "attention_dropout" in row.reason


class OfRows(GRPOTrainer):
    """Its loss pulls on the weights once a row, whatever the row's advantage."""

    def _compute_loss(self, model, inputs):
        pull = sum(weight.square().sum() for weight in model.parameters() if weight.requires_grad)
        return super()._compute_loss(model, inputs) + 1e-3 * len(inputs["completion_ids"]) * pull


class Replayed(GRPOTrainer):
    """Rows whose rewards are all equal are given an advantage after all."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": output["advantages"] + 1.0}


@pytest.mark.parametrize(("cls", "method"), [(OfRows, "_compute_loss"), (Replayed, "_generate_and_score_completions")])
def test_a_class_with_a_loss_or_advantages_of_its_own_is_left_alone(tiny, tmp_path, text_rows, cls, method):
    def train(names):
        def change(trainer):
            trainer.__class__ = cls

        return trained(names, tiny("qwen3"), text_rows, tmp_path, change=change, rewards=[half_dead], **BATCH)

    (plain, _), (mine, speedups) = train("none"), train("skip_dead")
    row = next(row for row in speedups.table() if row.name == "skip_dead")
    assert gap(weights_of(mine), weights_of(plain)) == 0.0
    assert not row.on and f"{cls.__name__} has a `{method}` of its own" in row.reason


def test_removal_leaves_nothing(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    before = patched(trainer)
    speed_up(trainer, ["skip_dead"]).remove()
    assert patched(trainer) == before


def test_a_probe_keeps_the_share_of_each_step_that_was_trained_on(tiny, tmp_path, text_rows):
    def probed(names, reward):
        probes = []
        trained(
            names, tiny("qwen3"), text_rows, tmp_path, change=lambda t: probes.append(Probe(t, warmup=1)),
            rewards=[reward], lora=False, **{**BATCH, "max_steps": 3},
        )  # fmt: skip
        return probes[0].record()

    record = probed(["skip_dead"], half_dead)
    assert record.living_shares == [0.5, 0.5] and record.living_share == 0.5
    assert probed(["skip_dead"], all_dead).living_shares == [0.0, 0.0]
    assert probed([], half_dead).living_shares == [] and probed([], half_dead).living_share is None


def test_the_first_comparison_of_a_speed_up_is_no_part_of_the_step_in_which_rows_first_live(tiny, tmp_path, text_rows):
    calls = itertools.count()

    def dead_at_first(completions, **kwargs):
        return all_dead(completions) if next(calls) == 0 else half_dead(completions)

    probes = []
    trained(
        ["skip_dead", "shared_prefix"], tiny("qwen3"), text_rows, tmp_path / "run", rewards=[dead_at_first], lora=False,
        change=lambda t: probes.append(Probe(t, out_dir=tmp_path, warmup=1)), **{**BATCH, "max_steps": 3},
    )  # fmt: skip
    timings = probes[0].record().timings
    steps = [json.loads(line)["spans"] for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    once_s = [sum(span[4] for span in spans if span[:2] == ["", "first_use"]) for spans in steps]
    assert once_s[1] > 0.0 and once_s[2] == 0.0, "in the first step in which rows live"
    for step_s, spans, apart_s in zip(timings.step_s, steps[1:], once_s[1:], strict=True):
        assert step_s == pytest.approx(spans[0][4] - apart_s, rel=1e-3)
