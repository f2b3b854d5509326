"""Evaluation with its own sampling, and training as before afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.train.trainer import build_trainer
from tests.support.training import text_config

GRPO = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "top_p": 0.9, "top_k": 7}
HELD_OUT = {"eval_split": "train", "max_eval_samples": 2}


def test_an_evaluation_is_greedy_and_training_is_not(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    said: list[str] = []
    changes = {"eval_sampling": {"temperature": 0}, "data": HELD_OUT, "speedups": "auto"}
    config = text_config(tiny("qwen3"), tmp_path, changes, **GRPO, log_completions=True)
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(tmp_path / "out")}, say=said.append)
    settings, seen = trainer.generation_config, list[list[Any]]()
    judge = trainer.reward_funcs[0]

    def watched(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        seen.append([tuple(ids) for ids in completion_ids])
        rewards: list[float] = judge(completion_ids=completion_ids, **columns)
        return rewards

    trainer.reward_funcs[0] = watched
    first, second = trainer.evaluate(), trainer.evaluate()
    assert len(seen) == 4 and all(len(set(group)) == 1 for group in seen)
    assert seen[:2] == seen[2:] and first["eval_reward"] == second["eval_reward"] and first["eval_reward_std"] >= 0
    assert trainer.generation_config is settings and settings.do_sample and settings.top_k == 7
    alike = "eval_sampling is greedy, so a prompt's 4 completions are alike: set grpo.num_generations_eval to 1"
    assert said.count(alike) == 1
    trainer.num_generations_eval = 1
    assert trainer.evaluate()["eval_reward"] == pytest.approx(first["eval_reward"], abs=1e-6)


def test_what_is_left_out_is_as_in_training(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    changes = {"eval_sampling": {"temperature": 0.5, "top_k": 3}, "data": HELD_OUT}
    config = text_config(tiny("qwen3"), tmp_path, changes, **GRPO)
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(tmp_path / "out")}, say=[].append)
    seen = []

    def watched(completions: list[Any], **columns: Any) -> list[float]:
        settings = trainer.generation_config
        seen.append((settings.do_sample, settings.temperature, settings.top_k, settings.top_p))
        return [0.0] * len(completions)

    trainer.reward_funcs[0] = watched
    trainer.evaluate()
    assert set(seen) == {(True, 0.5, 3, 0.9)}
    assert (trainer.generation_config.temperature, trainer.generation_config.top_k) == (1.0, 7)
