"""Rows sorted by length within an optimizer step: the same sums, less padding, the random stream as it was."""

from __future__ import annotations

import pytest
import torch

from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import SAME, make_trainer, spread_reward

from trl import GRPOTrainer  # isort: skip
from grpo_autotune.seams.layers import AttributeSlot, wrap  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.batches.rows import take, trim  # isort: skip
from grpo_autotune.speedups.batches.order import depends_on_partition  # isort: skip

UNEVEN = {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "max_completion_length": 12, "max_steps": 5}


def uneven_answers(trainer):
    """Sampled answers of this model hardly ever end early: row `i` of a generation keeps `1 + i` tokens."""
    generate = trainer._generate_single_turn

    def shortened(*args, **kwargs):
        ids, logprobs = generate(*args, **kwargs)
        return [row[: 1 + index % len(row)] for index, row in enumerate(ids)], logprobs

    trainer._generate_single_turn = shortened


@pytest.fixture
def ragged_rows(text_rows):
    """Questions of different lengths."""
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"][0]["content"] * (index + 1)}]}
        for index, row in enumerate(text_rows)
    ]


def run(names, *args, **grpo):
    return trained(names, *args, change=uneven_answers, rewards=[spread_reward], lora=False, **{**UNEVEN, **grpo})


@pytest.mark.parametrize(
    ("kind", "grpo"),
    [
        ("qwen3", {"loss_type": "dapo"}),
        ("llama", {"loss_type": "grpo", "beta": 0.05}),
        ("qwen2_5_vl", {"loss_type": "dr_grpo", "num_iterations": 2}),
        ("qwen3_vl", {"loss_type": "dapo", "beta": 0.05, "pad_to_multiple_of": 4}),
        ("qwen3", {"loss_type": "cispo", "steps_per_generation": 4, "gradient_accumulation_steps": 2}),
    ],
)
def test_training_is_the_same_on_fewer_cells(tiny, tmp_path, ragged_rows, picture_rows, kind, grpo):
    rows = picture_rows if kind.endswith("vl") else ragged_rows
    plain, _ = run("none", tiny(kind), rows, tmp_path, **grpo)
    mine, speedups = run("length_sort", tiny(kind), rows, tmp_path, **grpo)
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) < SAME
    cells = speedups.facts()["length_sort"]
    assert cells["kept_cells"] < cells["padded_cells"]


def test_rows_stay_inside_their_optimizer_step(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, steps_per_generation=4, gradient_accumulation_steps=2)

    def generated(call_next, inputs):
        mask = torch.tril(torch.ones(8, 8, dtype=torch.long))
        ids = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask}
        return {**ids, "row": torch.arange(8), "other": list("abcdefgh")}

    wrap(AttributeSlot(trainer, "_generate_and_score_completions"), generated)

    def shuffled() -> list[int]:
        torch.manual_seed(0)
        trainer._buffered_inputs = None
        trainer._prepare_inputs([{}] * 8)
        found = [row for batch in trainer._buffered_inputs for row in batch["row"].tolist()]
        assert [ord(letter) - ord("a") for batch in trainer._buffered_inputs for letter in batch["other"]] == found
        return found

    plain = shuffled()
    speedups = speed_up(trainer, ["length_sort"])
    mine = shuffled()
    speedups.remove()
    assert mine[:4] == sorted(plain[:4], reverse=True) and mine[4:] == sorted(plain[4:], reverse=True)
    assert shuffled() == plain


def test_another_trainer_in_the_same_process_is_left_alone(tiny, tmp_path, text_rows):
    sped_up = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    speedups = speed_up(sped_up, ["length_sort"])
    run("none", tiny("qwen3"), text_rows, tmp_path)
    assert speedups.facts()["length_sort"] == {"padded_cells": 0.0, "kept_cells": 0.0}
    speedups.remove()


def test_trimming_keeps_every_used_column():
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 7, 8], [0, 6, 7, 8]]),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0, 0, 0], [1, 0, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        "ref_per_token_logps": torch.zeros(2, 5),
        "importance_sampling_ratio": torch.ones(2, 1),
        "mm_token_type_ids": torch.arange(18).view(2, 9),
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(3),
    }
    cut = trim(batch)
    assert cut["prompt_ids"].tolist() == [[0, 7, 8], [6, 7, 8]] and cut["completion_ids"].tolist() == [[1, 2], [1, 0]]
    assert cut["ref_per_token_logps"].shape == (2, 2) and cut["importance_sampling_ratio"].shape == (2, 1)
    assert cut["mm_token_type_ids"].tolist() == [[1, 2, 3, 4, 5], [10, 11, 12, 13, 14]]
    assert cut["num_items_in_batch"] == 3 and cut["advantages"] is batch["advantages"]
    assert trim(batch, 4)["completion_ids"].shape == (2, 4)
    assert trim(batch, prompts=False)["prompt_ids"].shape == (2, 4)
    nothing = {**batch, "completion_mask": torch.zeros(2, 5, dtype=torch.long)}
    assert trim(nothing)["completion_ids"].shape == (2, 1)


def test_taking_rows_takes_their_images():
    batch = {
        "prompt_ids": torch.arange(3)[:, None],
        "pixel_values": torch.arange(12.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 1], [1, 2, 3]]),
        "num_images": [1, 0, 2],
        "num_items_in_batch": torch.tensor(9),
    }
    part = take(batch, [2, 1])
    assert part["prompt_ids"].tolist() == [[2], [1]] and part["num_images"] == [2, 0]
    assert part["pixel_values"].flatten().tolist() == list(range(4, 12))
    assert part["image_grid_thw"].tolist() == [[1, 2, 1], [1, 2, 3]]


@pytest.mark.parametrize(
    ("grpo", "key"),
    [
        ({"loss_type": "bnpo"}, "grpo.loss_type"),
        ({"entropy_coef": 0.1}, "grpo.entropy_coef"),
        ({"top_entropy_quantile": 0.5}, "grpo.top_entropy_quantile"),
        ({"steps_per_generation": 3, "per_device_train_batch_size": 2}, "grpo.steps_per_generation"),
    ],
)
def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, grpo, key):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **grpo)
    before = patched(trainer)
    speedups = speed_up(trainer, ["length_sort"])
    row = next(row for row in speedups.table() if row.name == "length_sort")
    assert not row.on and key in row.reason
    speedups.remove()
    assert patched(trainer) == before


def test_a_class_with_a_loss_of_its_own_keeps_its_micro_batches(tiny, tmp_path, text_rows):
    class OfWidths(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * inputs["completion_ids"].shape[1]

    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    assert depends_on_partition(trainer) is None
    trainer.__class__ = OfWidths
    row = next(row for row in speed_up(trainer, ["length_sort"]).table() if row.name == "length_sort")
    assert not row.on and "OfWidths has a `_compute_loss` of its own" in row.reason
    assert "OfWidths" in (depends_on_partition(trainer) or "")
