"""The unlocked engine reads the prompt that is trained on, images included; TRL's own does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.rollout.colocate.placeholders import collapsed, collapsed_prompt, image_lengths
from grpo_autotune.rollout.colocate.requests import JoinedRequests
from grpo_autotune.rollout.parts import engine_of, part_of
from tests.support.exactness import set_to_train
from tests_vllm.engines import NATS, Rows, scored, unlocked

Colocated = Callable[..., Any]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise, so that two pictures are never alike."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture(scope="module")
def mixed_rows() -> Rows:
    """Two adjacent images of different sizes, none, one, and the first again with other pixels."""
    question = [{"role": "user", "content": "What is shown?"}]
    images = [
        [picture(56, 112, 1), picture(84, 56, 2)],
        [],
        [picture(112, 56, 3)],
        [picture(56, 112, 4), picture(84, 56, 5)],
    ]
    return [{"prompt": question, "images": row, "answer": str(i)} for i, row in enumerate(images)]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_plain_trl_reads_another_prompt(colocated: Colocated, picture_rows: Rows, kind: str) -> None:
    trainer = set_to_train(colocated(kind, picture_rows, model_init_kwargs={"dtype": "bfloat16"}))
    assert engine_of(trainer.vllm_generation) is None
    assert scored(trainer)[1].mean() > 0.05


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
def test_the_engine_samples_from_the_policy(
    colocated: Colocated, picture_rows: Rows, text_rows: Rows, kind: str, lora: bool
) -> None:
    trainer = unlocked(colocated, kind, picture_rows if kind.endswith("vl") else text_rows, {}, lora=lora)
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.model_config.dtype == torch.float32
    assert scored(trainer)[1].max() <= NATS


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_several_images_of_several_sizes_and_none(colocated: Colocated, mixed_rows: Rows, kind: str) -> None:
    trainer = unlocked(colocated, kind, mixed_rows, {}, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    batch, apart = scored(trainer)
    assert sorted(int(n) for n in batch["num_images"]) == [0, 0, 1, 1, 2, 2, 2, 2]
    assert apart.max() <= NATS
    requests = part_of(trainer.vllm_generation, JoinedRequests)
    assert (requests.completions, requests.sent) == (8, 4)


def test_every_run_becomes_one_placeholder() -> None:
    ids = [7, 1, 0, 0, 0, 2, 1, 0, 2, 9, 1, 0, 0, 2]
    assert collapsed(ids, 0) == [7, 1, 0, 2, 1, 0, 2, 9, 1, 0, 2]
    assert image_lengths(ids, 0) == [3, 1, 2]
    assert collapsed([0, 0], 0) == [0] and image_lengths([0, 0], 0) == [2]


def test_runs_that_are_not_the_images_stop() -> None:
    text = {"prompt_token_ids": [1, 2]}
    assert collapsed_prompt(text, 0) is text
    with pytest.raises(EnvironmentProblem, match="a prompt with 2 images has 1 runs"):
        collapsed_prompt({"prompt_token_ids": [1, 0, 0, 2], "multi_modal_data": {"image": ["a", "b"]}}, 0)
