"""Models of real shapes with random weights, drawn on the device, and runs of them through the product."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

import torch  # noqa: E402

from grpo_autotune.config.schema import RunConfig  # noqa: E402
from grpo_autotune.estimate.architectures import architecture  # noqa: E402
from grpo_autotune.probe.probe import Probe  # noqa: E402
from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.train.models.random_init import (  # noqa: E402
    WORDS,
    build_processor,
    build_tokenizer,
    random_model,
    save_model,
)
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402
from grpo_autotune.trials.child.fixed_lengths import FixedLengths  # noqa: E402

NAME = "qwen3-vl-2b"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = 4
"""Tokens of the completions of a warm-up step."""


def model_config(tiny: bool) -> dict[str, Any]:
    """The config.json of Qwen3-VL-2B, or of a model of two layers with its kinds of layers."""
    config = copy.deepcopy(dict(architecture(NAME).config))
    if tiny:
        config["text_config"] |= {
            "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
        config["text_config"]["rope_parameters"] |= {"mrope_section": [4, 2, 2]}
        config["vision_config"] |= {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
    return config


def model_folder(bench: Bench) -> Path:
    """Folder of the model, made once for all stages."""
    folder = bench.scratch / "model"
    if not folder.exists():
        config = model_config(bench.tiny)
        tokenizer = build_tokenizer(WORDS, vocab_size=config["text_config"]["vocab_size"])
        with torch.device(bench.device):
            model = random_model(with_ids(config, tokenizer), dtype="bfloat16")
        save_model(model, build_processor(config, tokenizer, min_pixels=28 * 28 if bench.tiny else None), folder)
    return folder


def with_ids(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The configuration with the special tokens where the tokenizer has them."""
    from grpo_autotune.train.models.random_init import TOKEN_ID_KEYS

    return config | {key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKEN_ID_KEYS.items()}


def pictures(split: str, pixels: int, words: int, count: int = 64) -> Any:
    """Synthetic pictures with questions of about `words` words."""
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pillow

    draw = np.random.default_rng(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(["What is shown?"] * (1 + words // 3)) + f" {number}"}],
            "image": Pillow.fromarray(draw.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)),
        }
        for number in range(count)
    ]
    messages = [{"role": Value("string"), "content": Value("string")}]
    return Dataset.from_list(rows, features=Features({"prompt": messages, "image": Image()}))


def run_config(bench: Bench, speedups: Any = "none", **grpo: Any) -> RunConfig:
    """The shipped profile of one large GPU: 4 prompts of 8 completions per step, LoRA, the tower frozen, 512 px."""
    values: dict[str, Any] = {
        "learning_rate": 1e-5, "max_steps": 100, "num_generations": 8, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8, "max_completion_length": 128, "beta": 0.0, "temperature": 1.0,
        "gradient_checkpointing": True, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
    }  # fmt: skip
    if bench.tiny:
        values |= {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        values |= {"max_completion_length": 8}
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": str(model_folder(bench)), "dtype": "bfloat16", "freeze_vision_tower": True},
            "peft": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": TARGETS},
            "data": {
                "path": "benchmarks.gpu.models:pictures",
                "params": {"pixels": 64 if bench.tiny else 512, "words": 12 if bench.tiny else 90},
            },
            "rewards": [{"name": "benchmarks.midsize:variety"}],
            "speedups": speedups,
            "grpo": values | grpo,
        }
    )


def lengths(bench: Bench) -> list[int]:
    """The lengths from which those of completions are drawn."""
    return [4, 6, 8] if bench.tiny else list(range(64, 129))


def trainer_of(bench: Bench, config: RunConfig) -> Any:
    """The trainer of a run, as a trial builds it."""
    told: list[str] = []
    return quiet_trainer(config, Startup(), told.append, out_dir=bench.scratch / "trainer")


def fixed(bench: Bench, trainer: Any, warmup: int = 1) -> FixedLengths:
    """Completion lengths that are the same for every variant; those of the first steps are short."""
    prompts = trainer.args.generation_batch_size // trainer.num_generations
    first = [[SHORT] * trainer.num_generations] * (prompts * warmup)
    return FixedLengths(trainer, lengths(bench), trainer.args.seed, first)


def train(trainer: Any, steps: int, probe: Probe) -> list[float]:
    """Train so many steps beyond the warm-up of a probe; seconds between their ends, by the host's clock."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())
            control.should_training_stop = state.global_step >= probe.warmup + steps

    ends: list[float] = []
    trainer.add_callback(Stop())
    trainer.train()
    return [end - begin for begin, end in itertools.pairwise(ends[-steps - 1 :])]


def release_trainer(trainer: Any) -> None:
    """Take apart what refers to itself, so that the device's memory is free for the next."""
    from grpo_autotune.seams.trainer_access import SPEED_UPS

    speedups = getattr(trainer, SPEED_UPS, None)
    if speedups is not None:
        speedups.remove()
    trainer.accelerator.free_memory()
    for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "_buffered_inputs"):
        setattr(trainer, name, None)


def stage_s(record: Any, stages: Sequence[str]) -> float:
    """Mean seconds per measured step of some stages."""
    steps = len(record.timings.step_s)
    return sum(sum(row.per_step_s) for row in record.timings.stages if row.name in stages) / max(1, steps)
