"""Real `GRPOTrainer`s on tiny models, as a user's script would build them.

With `GRPO_AUTOTUNE_TEST_DEVICE=cuda` in the environment they train on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.seams.torchvision_compat import ensure_torchvision

ensure_torchvision()

import torch  # noqa: E402
from datasets import Dataset, Features, Image, Value  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoProcessor, set_seed  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

DEVICE = os.environ.get("GRPO_AUTOTUNE_TEST_DEVICE", "cpu")
EXACT = 1e-5 if DEVICE == "cpu" else 1e-4
"""Relative difference that the order of sums explains. A GPU has more kernels, each with an order of its own."""
SAME = EXACT / 10
"""The same of weights after a few steps, absolute."""

if DEVICE == "cuda":
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are rounded to ten bits else

MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def spread_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Different for most completions, so that groups have spread."""
    return [len(completion[0]["content"]) % 7 / 6 for completion in completions]


def rising_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Different for all completions."""
    return [n / len(completions) for n in range(len(completions))]


async def async_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    columns = {"prompt": MESSAGES, "answer": Value("string")}
    if "image" in rows[0]:
        columns["image"] = Image()
    if "images" in rows[0]:
        columns["images"] = [Image()]
    return Dataset.from_list(rows, features=Features(columns))


def make_trainer(
    model: Path,
    rows: list[dict[str, Any]],
    out: Path,
    *,
    rewards: list[Callable[..., Any]] | None = None,
    lora: bool | LoraConfig = True,
    processor: Any = None,
    given: Mapping[str, Any] | None = None,
    **grpo: Any,
) -> GRPOTrainer:
    """G = 2, micro batches of 2, two of them an optimizer step; three steps; everything may be overridden.

    `given` are further arguments of the trainer itself."""
    settings = {
        "max_steps": 3,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": DEVICE != "cuda",
    }
    args = GRPOConfig(output_dir=str(out), **{**settings, **grpo})
    set_seed(args.seed)  # of an adapter's weights: TRL before 1.15 draws them unseeded
    return GRPOTrainer(
        model=str(model),
        reward_funcs=rewards or [spread_reward],
        args=args,
        train_dataset=dataset_of(rows),
        eval_dataset=dataset_of(rows[:2]),
        processing_class=processor or AutoProcessor.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora is True else lora or None,
        **(given or {}),
    )


def losses(trainer: GRPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
