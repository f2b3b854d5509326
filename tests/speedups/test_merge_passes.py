"""Micro batches merged into one pass: loss, gradients, metrics and training are plain TRL's, whatever the loss type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from grpo_autotune.errors import TrainingError
from grpo_autotune.speedups.batches import merge_passes
from grpo_autotune.speedups.batches.passes import Part, Row, planned, tokens_of
from tests.support.exactness import accumulated, gradients_apart, micro_batches, ready
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import make_trainer

import torch  # isort: skip
from trl import GRPOTrainer  # isort: skip
from grpo_autotune.probe.probe import Probe  # isort: skip
from grpo_autotune.seams.layers import INNER, wrap  # isort: skip
from grpo_autotune.speedups.batches.groups import KNOWN  # isort: skip
from grpo_autotune.speedups.batches.request import Request, rows_of  # isort: skip
from grpo_autotune.speedups.shared_prefix import layout, speedup  # isort: skip
from grpo_autotune.seams.table import find, slot_of  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip

HALF_GROUPS = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4}
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def assert_same(found, wanted):
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5, abs=1e-6)
    assert gradients_apart(found, wanted) <= 1e-5
    assert any(bool(gradient.any()) for gradient in wanted.gradients.values())
    assert found.metrics.keys() == wanted.metrics.keys() and wanted.metrics
    for name, values in found.metrics.items():
        assert values == pytest.approx(wanted.metrics[name], rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize(
    ("kind", "lora", "checkpointing", "beta", "losses"),
    [
        ("qwen3", True, False, 0.05, LOSSES),
        ("llama", False, False, 0.0, ["bnpo"]),
        ("qwen3_vl", True, True, 0.05, ["dapo"]),
        ("qwen2_5_vl", False, True, 0.0, ["grpo"]),
    ],
)
def test_loss_gradients_and_metrics_of_each_micro_batch_stay(
    tiny, tmp_path, text_rows, picture_rows, kind, lora, checkpointing, beta, losses
):
    rows = picture_rows if kind.endswith("vl") else text_rows
    grpo = {"gradient_checkpointing": checkpointing, "beta": beta, "num_iterations": 2, **HALF_GROUPS}
    trainer = ready(tiny(kind), rows, tmp_path, lora=lora, **grpo)
    speedups = speed_up(trainer, ["shared_prefix", "vision_cache", "merge_passes"])
    batches, found = micro_batches(trainer), {}
    for trainer.loss_type in losses:
        found[trainer.loss_type] = accumulated(trainer, batches)
    counts = speedups.facts()["merge_passes"]
    assert counts["micro_batches"] == 4.0 * len(losses) and counts["passes"] == counts["micro_batches"] / 2
    assert next(row.reason for row in speedups.table() if row.name == "merge_passes").endswith(
        "; 2.0 micro batches a pass"
    )
    speedups.remove()
    for trainer.loss_type in losses:
        assert_same(found[trainer.loss_type], accumulated(trainer, batches))


def test_under_autocast_it_is_no_further_off_than_rounding(tiny, tmp_path, text_rows):
    def build(autocast):
        return ready(tiny("qwen3"), text_rows, tmp_path, beta=0.05, num_iterations=2, bf16=autocast, **HALF_GROUPS)

    exact, rounded = build(False), build(True)
    batches = micro_batches(exact)
    for index, batch in enumerate(batches):
        batch["group_id"] = torch.full((2,), index // 2)
    precise, plain = accumulated(exact, batches), accumulated(rounded, batches)
    speedups = speed_up(rounded, "auto")
    merged = accumulated(rounded, batches)
    assert speedups.facts()["merge_passes"]["passes"] == 2.0
    rounding = gradients_apart(plain, precise)
    assert rounding > 2e-4, "autocast was not on"
    assert 0.0 < gradients_apart(merged, plain) <= 1.6 * rounding, "as in test_bf16"
    assert gradients_apart(merged, precise) <= 1.6 * rounding


@pytest.mark.parametrize("dead", [(1, 5), (2, 3), range(8)], ids=["some", "a micro batch", "all"])
def test_rows_without_a_gradient_are_left_out_of_merged_passes(tiny, tmp_path, text_rows, dead, monkeypatch):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, lora=False, beta=0.0, **HALF_GROUPS)
    speedups = speed_up(trainer, ["shared_prefix", "skip_dead"])
    batches = micro_batches(trainer, dead)
    wanted = accumulated(trainer, batches)
    facts = speedups.facts()["skip_dead"]
    speedups.remove()
    speedups = speed_up(trainer, ["shared_prefix", "skip_dead", "merge_passes"])
    found = accumulated(trainer, batches)
    assert speedups.facts()["skip_dead"] == facts == {"rows": 8.0, "skipped_rows": float(len(dead))}
    assert speedups.facts()["merge_passes"]["passes"] < 4.0
    if len(dead) < 8:
        assert_same(found, wanted)
    else:
        assert found.gradients.keys() == wanted.gradients.keys()
        assert not any(bool(gradient.any()) for gradient in found.gradients.values())


def test_training_and_its_log_are_the_same(tiny, tmp_path, picture_rows):
    """Beside a probe, whose record counts the passes that ran."""
    seen = {}

    def run(names):
        def change(trainer):
            seen["probe"] = Probe(trainer)

        given = {"max_steps": 5, "beta": 0.05, **HALF_GROUPS}
        trainer, speedups = trained(names, tiny("qwen3_vl"), picture_rows, tmp_path, change=change, **given)
        lines = [{key: value for key, value in line.items() if key not in TIMES} for line in trainer.state.log_history]
        return trainer, speedups, lines, seen["probe"].record()

    plain, _, _, _ = run("none")
    _, _, wanted, before = run(["shared_prefix", "skip_dead", "length_sort"])
    mine, speedups, lines, record = run(["shared_prefix", "skip_dead", "length_sort", "merge_passes"])
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) < 1e-6
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
    passes = speedups.facts()["merge_passes"]["passes"] / 5
    calls, calls_before = ({row.name: row.calls for row in one.timings.stages} for one in (record, before))
    assert passes <= 3.0
    assert calls["backward"] == pytest.approx(passes) and calls_before["backward"] == 4.0
    assert record.trainer.gradient_accumulation_steps == 4 and "merge_passes" in record.trainer.speedups
    assert sum(record.timings.step_s) == pytest.approx(
        sum(sum(row.per_step_s) for row in record.timings.stages), rel=1e-6
    )


def test_a_window_that_was_cut_off_is_forgotten(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, **HALF_GROUPS)
    speed_up(trainer, ["shared_prefix", "merge_passes"])
    batches = micro_batches(trainer)
    wanted = accumulated(trainer, batches)
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, dict(batches[0])))
    trainer.state = type(trainer.state)()  # of the next call of `train`
    assert_same(accumulated(trainer, batches, first=1), wanted)


def test_a_loss_in_between_never_takes_the_place_of_a_micro_batch(tiny, tmp_path, text_rows):
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, **HALF_GROUPS)
    speed_up(trainer, ["shared_prefix", "merge_passes"])
    batch = micro_batches(trainer)[0]
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    trainer.compute_loss(trainer.model, dict(batch))
    with pytest.raises(TrainingError, match="speedups: compute_loss was called in between"):
        trainer.compute_loss(trainer.model, dict(batch))


def test_a_pass_that_disagrees_is_not_used(tiny, tmp_path, text_rows):
    def off_by_one(call_next, model, input_ids, *args, **kwargs):
        logps, *rest = call_next(model, input_ids, *args, **kwargs)
        return (logps + (len(input_ids) > 2), *rest)

    trainer = ready(tiny("qwen3"), text_rows, tmp_path, **HALF_GROUPS)
    speedups = speed_up(trainer, ["shared_prefix", "merge_passes"])
    batches = micro_batches(trainer)
    wrap(slot_of(trainer, find("logps")), off_by_one, INNER)
    found = accumulated(trainer, batches)
    row = next(row for row in speedups.table() if row.name == "merge_passes")
    assert not row.on and "self-check" in row.reason
    assert_same(found, accumulated(trainer, batches))


def test_merged_passes_know_their_rows_without_waiting_for_a_device(tiny, tmp_path, text_rows, monkeypatch):
    monkeypatch.setattr(speedup, "waits", lambda device: True)
    trainer = ready(tiny("qwen3"), text_rows, tmp_path, beta=0.05, **HALF_GROUPS)
    speedups = speed_up(trainer, ["shared_prefix", "merge_passes"])
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batches, known = trainer._buffered_inputs, []

    def batch_of(*given):
        known.append(given[-1])
        return layout.batch_of(*given)

    monkeypatch.setattr(speedup, "batch_of", batch_of)
    found = accumulated(trainer, batches)
    assert speedups.facts()["merge_passes"] == {"micro_batches": 4.0, "passes": 2.0}
    assert all(rows is not None for rows in known)
    assert_same(found, accumulated(trainer, [{**batch, KNOWN: None} for batch in batches]))


def test_rows_that_the_host_knows_are_not_read_from_the_device():
    there = torch.ones(2, 7, dtype=torch.long, device="meta")
    asked = [Request(there, there, 3, {}, there[:, 0], torch.tensor([[0, 4, 3, 0], [5, 2, 1, 0]]))] * 2
    assert rows_of(asked) == [[Row(0, 4, 3), Row(5, 2, 1)]] * 2


class OwnStep(GRPOTrainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, monkeypatch):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **HALF_GROUPS)

    def why():
        speedups = speed_up(trainer, ["merge_passes"])
        row = next(row for row in speedups.table() if row.name == "merge_passes")
        speedups.remove()
        return None if row.on else row.reason

    before = patched(trainer)
    assert why() is None
    assert patched(trainer) == before
    for owner, name, value, word in (
        (trainer, "aux_loss_enabled", True, "router_aux_loss_coef"),
        (trainer, "_entropy_bonus_enabled", True, "entropy_coef"),
        (trainer, "num_generations", 2, "whole groups"),
        (trainer, "is_fsdp_enabled", True, "FSDP 1"),
        (trainer, "__class__", OwnStep, "OwnStep has a `training_step`"),
        (trainer.args, "steps_per_generation", 1, "nothing to merge"),
        (trainer.args, "gradient_accumulation_steps", 3, "no multiples"),
        (trainer.args, "optim", "lomo", "grpo.optim"),
        (trainer.args, "torch_compile", True, "grpo.torch_compile"),
        (trainer.model, "norm_of_batch", torch.nn.BatchNorm1d(1), "batch normalisation"),
        (trainer.model, "attention_dropout", 0.1, "attention_dropout"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            assert word in str(why()), name
    assert why() is None


@pytest.mark.parametrize(
    ("by_launches", "rows", "most", "wanted"),
    [
        (False, [0, 0, 0, 0], 400, [[0, 1, 2, 3]]),  # one group in four pieces
        (False, [0, 0, 1, 1], 1000, [[0, 1], [2, 3]]),  # a CPU stops where nothing more is saved
        (True, [0, 0, 1, 1], 1000, [[0, 1, 2, 3]]),  # a GPU goes on to the budget
        (True, [0, 0, 1, 1], 220, [[0, 1], [2, 3]]),
        (True, [0, 1, 2, 3], 119, [[0], [1], [2], [3]]),
    ],
)
def test_neighbours_go_together_as_long_as_that_pays_and_fits(by_launches, rows, most, wanted):
    """Two rows each, of a prompt of 100 tokens and a completion of 11."""
    parts = [Part("text", [Row(group, 100, 11)] * 2) for group in rows]
    assert planned(parts, most, shared=True, by_launches=by_launches) == wanted
    assert tokens_of(parts[0].rows, shared=True) == 120


def test_parts_of_another_kind_and_padded_rows_stay_apart():
    rows = [Row(0, 100, 11)] * 2
    parts = [Part("text", rows), Part("images", rows), Part("images", rows)]
    assert planned(parts, 1000, shared=True, by_launches=True) == [[0], [1, 2]]
    assert tokens_of([Row(0, 100, 11), Row(0, 10, 30)], shared=False) == 260
    assert planned(parts[1:], 1000, shared=False, by_launches=False) == [[0], [1]], "padding saves nothing"
    assert planned(parts[1:], 1000, shared=False, by_launches=True) == [[0, 1]]


def test_a_pass_is_cut_where_one_of_another_rank_begins(monkeypatch):
    installed = SimpleNamespace(trainer=None)
    others = [1, 0, 1, 0, 0]
    monkeypatch.setattr(merge_passes, "backward_in_step", lambda trainer: True)
    monkeypatch.setattr(merge_passes, "most", lambda numbers, *_: list(map(max, numbers, others)))
    cut = merge_passes.Merging._on_all_ranks(installed, [[0, 1, 2, 3], [4]], 5)
    assert cut == [[0, 1], [2, 3], [4]]
