"""The demo's data and model: real digits, a held-out split, a model that is built once and learns from its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_autotune.config.schema import load_config
from grpo_autotune.demo import (
    CANVAS_PX,
    CONFIG,
    HELD_OUT,
    QUESTION,
    Recipe,
    answered,
    demo_model_path,
    digits_dataset,
    load_digits,
)
from grpo_autotune.errors import ConfigError

QUICK = Recipe(see_steps=6, say_steps=12, slip_steps=2, batch=8)


def test_splits_share_no_digit() -> None:
    train, test = load_digits("train"), load_digits("test")
    assert len(test.labels) == HELD_OUT and len(train.labels) + len(test.labels) == 1797
    held_out = {one.tobytes() for one in test.pixels}
    assert not held_out & {one.tobytes() for one in train.pixels}


def test_rows_are_questions_with_one_image() -> None:
    rows = digits_dataset("test", count=20)
    assert rows.column_names == ["prompt", "image", "answer"]
    assert rows[0]["prompt"] == [{"role": "user", "content": QUESTION}]
    assert rows[0]["image"].size == (CANVAS_PX, CANVAS_PX)
    assert set(rows["answer"]) <= set("0123456789")


def test_every_row_shows_the_digit_it_says() -> None:
    digits = load_digits("test")
    label_of = {one.tobytes(): str(label) for one, label in zip(digits.pixels, digits.labels, strict=True)}
    places = set()
    for row in digits_dataset("test", count=40):
        grey = np.asarray(row["image"])[..., 0]
        found = [
            (top, left)
            for top in range(0, CANVAS_PX - 31, 16)
            for left in range(0, CANVAS_PX - 31, 16)
            if label_of.get(grey[top : top + 32, left : left + 32].tobytes()) == row["answer"]
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 10


def test_same_seed_same_rows_and_more_rows_than_digits() -> None:
    first, again, other = (digits_dataset("test", count=310, seed=seed) for seed in (1, 1, 2))
    assert first["answer"] == again["answer"] != other["answer"]
    assert np.array_equal(np.asarray(first[5]["image"]), np.asarray(again[5]["image"]))
    assert len(first) == 310


def test_canvas_is_a_choice_with_a_lower_end() -> None:
    assert digits_dataset("test", canvas=160, count=1)[0]["image"].size == (160, 160)
    with pytest.raises(ConfigError, match=r"data\.params\.canvas"):
        digits_dataset("test", canvas=16)
    with pytest.raises(ConfigError, match=r"no split 'validation'.*train or test"):
        digits_dataset("validation")


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory: pytest.TempPathFactory):
    """The demo's model after a warm start of a few steps, its cache folder and the progress that was told."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    told: list[float] = []
    yield demo_model_path(QUICK, told.append), told
    patch.undo()


def test_build_tells_its_progress_and_is_kept(quick_model) -> None:
    folder, told = quick_model
    assert told == sorted(told) and len(told) == 18 and told[-1] == 1.0
    again: list[float] = []
    assert demo_model_path(QUICK, again.append) == folder
    assert again == []


def test_another_recipe_is_another_model(quick_model) -> None:
    folder, _ = quick_model
    other = demo_model_path(Recipe(see_steps=1, say_steps=1, slip_steps=0, batch=2), lambda share: None)
    assert other != folder and other.parent == folder.parent


def test_model_is_qwen3_vl_of_one_to_five_million_parameters(quick_model) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, _ = quick_model
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == CONFIG["architectures"]
    assert 1e6 < sum(weight.numel() for weight in model.parameters()) < 5e6
    processor = AutoProcessor.from_pretrained(folder)
    image = digits_dataset("test", count=1)[0]["image"]
    inputs = answered(processor, [image, image], ["<answer>7</answer>", "7"])
    text = processor.tokenizer.decode(inputs["labels"][0][inputs["labels"][0] >= 0])
    assert text == "<answer>7</answer><|im_end|>"
    assert (inputs["labels"][1] >= 0).sum() == 2
    assert int(inputs["image_grid_thw"][0].prod()) == (CANVAS_PX // 16) ** 2


def test_warm_start_lowers_the_loss_of_a_right_answer(quick_model) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grpo_autotune.train.models.random_init import random_model, with_tokenizer

    folder, _ = quick_model
    processor = AutoProcessor.from_pretrained(folder)
    rows = digits_dataset("test", count=8)
    inputs = answered(processor, rows["image"][:], [f"<answer>{digit}</answer>" for digit in rows["answer"]])
    untrained = random_model(with_tokenizer(CONFIG, processor.tokenizer))
    with torch.no_grad():
        before = float(untrained(**inputs).loss)
        after = float(AutoModelForImageTextToText.from_pretrained(folder)(**inputs).loss)
    assert after < before - 1.0


def test_profile_trains_the_demo_and_evaluates_held_out_rows(quick_model, tmp_path: Path) -> None:
    from grpo_autotune import registry
    from grpo_autotune.train.trainer import build_trainer

    folder, _ = quick_model
    small = ["grpo.max_steps=2", "grpo.per_device_train_batch_size=8", "grpo.eval_on_start=false"]
    small += ["data.max_samples=8", "data.max_eval_samples=4", "grpo.per_device_eval_batch_size=4"]
    config = load_config("demo", [*small, f"model.name_or_path={folder}"])
    assert load_config("demo").model.name_or_path == "demo"
    assert registry.resolve("model", "demo") is demo_model_path
    trainer = build_trainer(
        config, grpo_overrides={"save_strategy": "no", "report_to": "none", "output_dir": str(tmp_path)}
    )
    trainer.train()
    assert trainer.state.global_step == 2
    metrics = trainer.evaluate()
    assert {"eval_rewards/exact_match/mean", "eval_rewards/format/mean", "eval_reward"} <= set(metrics)
