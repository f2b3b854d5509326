"""Text rows in a data set of images: in a micro batch of their own, in a whole generation of their own, sped up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from grpo_autotune.scripts.values import ScriptValues
from grpo_autotune.seams.mixed_image_rows import mend
from tests.support.exactness import apart, generation, ready
from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import make_trainer
from tests.support.training import losses, picture_config

from grpo_autotune.train.trainer import run_training  # isort: skip
import torch  # isort: skip

EXACT = 1e-5
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "shuffle_dataset": False}
"""Each micro batch a row, two of four prompts without an image; a generation is all four."""
GENERATION_ALONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "shuffle_dataset": False}
"""Each generation a prompt, every other one without an image."""


def rows(column: str) -> list[dict[str, Any]]:
    """Text, image, text, image, of uneven length."""
    found: list[dict[str, Any]] = []
    for n in range(4):
        image = Image.new("RGB", (56, 56), (40 * n, 90, 200)) if n % 2 else None
        question = [{"role": "user", "content": "What is shown?" if n % 2 else f"What is {n}{' plus three' * n}?"}]
        value = image if column == "image" else [image] if image else None
        found.append({"prompt": question, "answer": str(n), column: value})
    return found


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_log_probs_are_those_of_a_batch_of_text(tiny, tmp_path, kind, column):
    trainer = ready(tiny(kind), rows(column), tmp_path, beta=0.04, gradient_checkpointing=False, **ALONE)
    before = patched(trainer)
    handles = mend(trainer)
    batch = generation(trainer)
    counts = batch["num_images"]
    assert sorted(counts) == [0] * 4 + [1] * 4
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    keep = batch["completion_ids"].shape[1]
    score = trainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        found = score(trainer.model, ids, mask, keep, batch_size=1, **images)[0]
        text = [row for row, count in enumerate(counts) if count == 0]
        alone = score(trainer.model, ids[text], mask[text], keep)[0]
    kept = batch["completion_mask"][text].bool()
    assert apart(found[text][kept], alone[kept]) <= EXACT
    for handle in handles:
        handle.remove()
    assert patched(trainer) == before


@pytest.mark.parametrize("settings", [ALONE, GENERATION_ALONE], ids=["micro_batch", "generation"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_sped_up_as_plain(tiny, tmp_path, kind, settings):
    arguments = tiny(kind), rows("image"), tmp_path
    runs = [
        trained(names, *arguments, change=mend, beta=beta, max_steps=4, **settings)
        for names, beta in (("none", 0.04), ("auto", 0.04), ("none", 0.0), ("auto", 0.0))
    ]
    for (plain, _), (fast, speedups) in (runs[:2], runs[2:]):
        assert {"shared_prefix", "shared_prefill", "vision_cache"} <= {row.name for row in speedups.table() if row.on}
        assert rewards_of(fast) == rewards_of(plain)
        assert gap(weights_of(fast), weights_of(plain)) < EXACT


def test_from_a_configuration(tiny, tmp_path):
    config = picture_config(
        tiny("qwen3_vl"), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=2
    )
    data = Path(config.data.path)
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    data.write_text("\n".join(json.dumps(line | {"image": None} if n % 2 else line) for n, line in enumerate(lines)))
    run_training(config, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_a_tokenizer_that_knows_the_token_of_an_image():
    assert mend(SimpleNamespace(processing_class=SimpleNamespace(image_token_id=3))) == []


def test_in_a_script(tiny, tmp_path):
    trainer = make_trainer(tiny("qwen3_vl"), rows("image"), tmp_path, **ALONE)
    ScriptValues({}).finish(trainer, print)
    trainer.train()
    assert trainer.state.global_step == 3
