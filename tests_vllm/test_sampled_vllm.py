"""Dynamic sampling and evaluation's own sampling with an engine in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.train.trainer import build_trainer
from tests.support.training import text_config
from tests_vllm.conftest import TRL_SETS

GRPO = {
    "use_vllm": True, "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 4, "use_cpu": True,
    "bf16": False, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
"""Two prompts per step."""


@pytest.fixture
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in TRL_SETS:
        os.environ.pop(name, None)
    os.environ.update(before)


def test_rounds_of_an_engine_and_a_greedy_evaluation(
    served: Callable[[str], Path], tmp_path: Path, environment: None
) -> None:
    changes = {
        "data": {"eval_split": "train"},
        "rewards": [{"name": "tests.support.resample_ranks:lively"}],
        "resample": {},
        "eval_sampling": {"temperature": 0},
        "vllm": {"mode": "colocate", "max_model_len": 256},
        "speedups": "auto",
    }
    config = text_config(served("qwen3"), tmp_path, changes, **GRPO)
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(tmp_path / "out"), "save_strategy": "no"})
    seen: dict[bool, list[list[tuple[int, ...]]]] = {True: [], False: []}
    judge = trainer.reward_funcs[0]

    def watched(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        seen[trainer.model.training].append([tuple(ids) for ids in completion_ids])
        rewards: list[float] = judge(completion_ids=completion_ids, **columns)
        return rewards

    trainer.reward_funcs[0] = watched
    score, answers = trainer._generate_and_score_completions, []

    def scored(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = score(inputs)
        if trainer.model.training:
            answers.extend(int(row["answer"]) for row in inputs)
            assert output["sampling_per_token_logps"].shape == output["completion_ids"].shape
            apart = (output["old_per_token_logps"] - output["sampling_per_token_logps"]) * output["completion_mask"]
            assert apart.abs().max() < 1e-3  # log-probs of the engine stay with their rows
        return output

    trainer._generate_and_score_completions = scored
    trainer.train()
    assert len(answers) == 16 and not any(answer % 2 for answer in answers)
    assert len(seen[True]) == trainer.resampling.facts.rounds > 2
    greedy = [completion for batch in seen[False] for completion in batch]
    assert greedy[::2] == greedy[1::2] and len(greedy) == 16
    assert trainer.vllm_generation.temperature == 1.0
    trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
