"""Prompts read once a group: the same tokens as TRL's own generation, whatever is drawn and whoever is done first."""

from __future__ import annotations

import pytest
import torch

from grpo_autotune.trials.child.fixed_lengths import FixedLengths
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import DEVICE, SAME, make_trainer

from grpo_autotune.speedups.generation.decoding import Decoder  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.batches.rows import take  # isort: skip
from grpo_autotune.speedups.generation.shared_prefill import _alike, _first_rows  # isort: skip
from grpo_autotune.speedups.generation.step import FixedStep  # isort: skip

GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12}


def many_ends(trainer):
    """A tenth of the vocabulary ends an answer, so that rows finish at different steps."""
    ends = list(range(0, len(trainer._tokenizer), 10))
    trainer.eos_token_ids = ends
    trainer.generation_config.eos_token_id = ends
    trainer.generation_kwargs["eos_token_id"] = ends


@pytest.fixture
def ragged_rows(text_rows):
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"][0]["content"] * (index + 1)}]}
        for index, row in enumerate(text_rows)
    ]


def generations(trainer):
    """Completions of each generation of a run."""
    seen = []
    inner = trainer._generate

    def kept(*args, **kwargs):
        found = inner(*args, **kwargs)
        seen.append([list(ids) for ids in found[1]])
        return found

    trainer._generate = kept
    return seen


def run(tiny, tmp_path, rows, names, kind, *, ends=True, lora=True, lengths=None, **grpo):
    seen = []

    def change(trainer):
        if ends:
            many_ends(trainer)
        if lengths:
            FixedLengths(trainer, lengths, seed=0)
        seen.append(generations(trainer))

    trainer, speedups = trained(
        names, tiny(kind), rows, tmp_path, change=change, lora=lora, **{**GROUPS, "max_steps": 2, **grpo}
    )
    return trainer, speedups, seen[0]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_same_completions_are_drawn(tiny, tmp_path, picture_rows, ragged_rows, kind, lora):
    rows = picture_rows if kind.endswith("vl") else ragged_rows
    plain, _, wanted = run(tiny, tmp_path, rows, "none", kind, lora=lora, max_steps=5)
    mine, speedups, found = run(tiny, tmp_path, rows, "shared_prefill", kind, lora=lora, max_steps=5)
    assert found == wanted
    assert {len(ids) for generation in wanted for ids in generation} > {12}, "some end early"
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) < SAME
    facts = speedups.facts()["shared_prefill"]
    assert facts["rows"] == 4 * facts["prompts"] and facts["row_steps"] < facts["row_steps_of_plain"]


@pytest.mark.parametrize(
    "grpo",
    [
        {"generation_kwargs": {"do_sample": False}},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
        {"pad_to_multiple_of": 16},
        {"generation_kwargs": {"min_new_tokens": 5}},
    ],
    ids=["greedy", "truncated sampling", "padded", "minimum length"],
)
def test_every_way_of_drawing(tiny, tmp_path, ragged_rows, grpo):
    _, _, wanted = run(tiny, tmp_path, ragged_rows, "none", "llama", **grpo)
    _, speedups, found = run(tiny, tmp_path, ragged_rows, "shared_prefill", "llama", **grpo)
    assert found == wanted and speedups.facts()["shared_prefill"]["rows"] > 0


def test_a_trial_that_fixes_lengths_shares_prompts_too(tiny, tmp_path, ragged_rows):
    _, _, wanted = run(tiny, tmp_path, ragged_rows, "none", "llama", lengths=[3, 5, 12])
    _, speedups, found = run(tiny, tmp_path, ragged_rows, "shared_prefill", "llama", lengths=[3, 5, 12])
    assert found == wanted and {len(ids) for generation in found for ids in generation} == {3, 5, 12}
    facts = speedups.facts()["shared_prefill"]
    assert facts["rows"] == 4 * facts["prompts"] > 0 and facts["row_steps"] < facts["row_steps_of_plain"]


def test_active_dropout_is_named(tiny, tmp_path, text_rows):
    """TRL generates in train mode: dropout takes numbers from the random stream there too."""
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **GROUPS)
    next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)).attention_dropout = 0.1
    row = next(row for row in speed_up(trainer, ["shared_prefill"]).table() if row.name == "shared_prefill")
    assert not row.on and "attention_dropout" in row.reason


def test_several_images_in_a_prompt(tiny, tmp_path):
    from PIL import Image

    def picture(shade: int, side: int) -> Image.Image:
        return Image.new("RGB", (side, 56), (shade, 90, 120))

    question = [{"role": "user", "content": "What is shown?"}]
    rows = [
        {"prompt": question, "images": images, "answer": ""}
        for images in (
            [picture(0, 56), picture(50, 112)],
            [picture(100, 56)],
            [picture(150, 84)] * 3,
            [picture(200, 56)],
        )
    ]

    def train(names):
        from datasets import Dataset, Features, List, Value
        from datasets import Image as ImageFeature

        from tests.support.trainers import MESSAGES

        seen = []

        def change(trainer):
            columns = {"prompt": MESSAGES, "images": List(ImageFeature()), "answer": Value("string")}
            trainer.train_dataset = Dataset.from_list(rows, features=Features(columns))
            seen.append(generations(trainer))

        plain = [{key: value for key, value in row.items() if key != "images"} for row in rows]
        _, speedups = trained(
            names, tiny("qwen3_vl"), plain, tmp_path, change=change, **{**GROUPS, "gradient_accumulation_steps": 4}
        )
        return seen[0], speedups

    wanted, _ = train("none")
    found, speedups = train("shared_prefill")
    assert found == wanted
    assert speedups.facts()["shared_prefill"]["prompts"] == 12


def test_images_that_differ_only_in_pixels_are_told_apart(tiny, tmp_path, picture_rows):
    """Same question, same size: the prompts' ids and grids are equal."""
    _, speedups, found = run(tiny, tmp_path, picture_rows, "shared_prefill", "qwen3_vl", max_steps=1)
    _, _, wanted = run(tiny, tmp_path, picture_rows, "none", "qwen3_vl", max_steps=1)
    assert found == wanted
    assert speedups.facts()["shared_prefill"]["prompts"] == 2


def test_rows_are_compared_before_they_are_shared():
    ids = torch.tensor([[1, 2], [1, 2], [3, 4], [3, 4]])
    pixels = torch.arange(8.0)[:, None] // 2
    grid = torch.tensor([[1, 1, 2]] * 4)
    first_rows, prompt_of_row = _first_rows(torch.tensor([7, 7, 5, 5]))
    assert first_rows == [0, 2] and prompt_of_row == [0, 0, 1, 1]
    same = {"input_ids": ids, "pixel_values": pixels // 2, "image_grid_thw": grid, "num_images": [1] * 4}
    assert _alike(same, first_rows, prompt_of_row)
    assert take(same, first_rows)["pixel_values"].shape == (4, 1)
    assert not _alike({**same, "pixel_values": pixels}, first_rows, prompt_of_row)
    assert not _alike({**same, "input_ids": torch.arange(8).view(4, 2)}, first_rows, prompt_of_row)
    assert not _alike({key: value for key, value in same.items() if key != "num_images"}, first_rows, prompt_of_row)


def test_rows_that_share_no_prompt_are_generated_as_ever(tiny, tmp_path, text_rows):
    """A sampler of the user's own, whose neighbours are different prompts."""

    def other_order(trainer):
        trainer._get_train_sampler = lambda dataset=None: list(range(4)) * 8
        many_ends(trainer)

    trainer, speedups = trained(
        "shared_prefill", tiny("llama"), text_rows, tmp_path, change=other_order, **{**GROUPS, "max_steps": 1}
    )
    assert speedups.facts()["shared_prefill"]["rows"] == 0
    assert trainer.state.global_step == 1


def test_the_same_distribution_where_the_stream_differs(tiny, tmp_path, text_rows):
    """Shares of the first token over many draws, against the chances that the model gives."""
    trainer = make_trainer(tiny("llama"), text_rows, tmp_path)
    model = trainer.model.get_base_model()
    ids = torch.tensor([[5, 6, 7]], device=DEVICE)
    with torch.no_grad():
        chances = model(ids).logits[0, -1].softmax(-1)
    draws, torch_seed = 20_000, 3
    torch.manual_seed(torch_seed)
    decoder = Decoder(torch.zeros(draws, dtype=torch.long))
    out = model.generate(ids, max_new_tokens=1, do_sample=True, top_k=0, custom_generate=decoder)
    counts = torch.bincount(out[:, -1], minlength=len(chances)).double()
    expected = chances.double() * draws
    chi_squared = float(((counts - expected).square() / expected).sum())
    degrees = len(chances) - 1
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_a_wrong_cache_is_noticed_and_left_to_trl(tiny, tmp_path, text_rows, caplog, monkeypatch):
    from transformers.cache_utils import DynamicLayer

    select = DynamicLayer.batch_select_indices
    monkeypatch.setattr(
        DynamicLayer, "batch_select_indices", lambda self, rows: (select(self, rows), self.keys.zero_())
    )
    _, speedups, found = run(tiny, tmp_path, text_rows, "shared_prefill", "llama")
    assert "speed-up shared_prefill is off" in caplog.text and "scores" in caplog.text
    monkeypatch.undo()
    assert found == run(tiny, tmp_path, text_rows, "none", "llama")[2]
    assert speedups.facts()["shared_prefill"]["rows"] == 0


def test_a_wrong_mask_is_noticed_where_no_prompt_is_padded(tiny, tmp_path, text_rows, caplog, monkeypatch):
    monkeypatch.setattr(FixedStep, "_mask", lambda self, tokens: None)
    run(tiny, tmp_path, [text_rows[0]] * 4, "shared_prefill", "llama")
    assert "speed-up shared_prefill is off" in caplog.text


def test_generate_outside_training_is_untouched(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    before = patched(trainer)
    ids = torch.tensor([[5, 6, 7]], device=DEVICE)
    plain = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    speedups = speed_up(trainer, ["shared_prefill"])
    assert torch.equal(trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), plain)
    speedups.remove()
    assert patched(trainer) == before


@pytest.mark.parametrize(
    ("grpo", "key"),
    [
        ({"cache_implementation": "static"}, "grpo.cache_implementation"),
        ({"generation_kwargs": {"num_beams": 2}}, "grpo.generation_kwargs: num_beams"),
        ({"generation_kwargs": {"prefill_chunk_size": 8}}, "grpo.generation_kwargs: prefill_chunk_size"),
    ],
)
def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, grpo, key):
    speedups = speed_up(make_trainer(tiny("qwen3"), text_rows, tmp_path, **grpo), ["shared_prefill"])
    row = next(row for row in speedups.table() if row.name == "shared_prefill")
    assert not row.on and key in row.reason
