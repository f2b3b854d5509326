"""`torchrun -m tests.support.branch_ranks MODEL OUT`: a training with two branches, on two processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from grpo_autotune.config.sections.branches import Branches
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.train.advantages import put_ranks_on
from grpo_autotune.train.branches.control import BranchControl
from tests.support.pairs import trained

SECTION = {
    "column": "answer",
    "even": {"beta": 0.4, "kl_band": [0.0, 1e-12]},
    "odd": {"beta": 0.01, "kl_band": [1e3, 1e4]},
    "control": {"every": 2, "factor": 0.5},
}
GRPO = {"num_generations": 4, "gradient_accumulation_steps": 2, "beta": 0.4, "max_completion_length": 8,
        "max_steps": 5, "num_iterations": 2, "ddp_find_unused_parameters": False}  # fmt: skip


def written(call_next: Any, /, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
    """Completions by their prompt and place in the group, as no random stream of several processes gives them."""
    texts = [
        [(sum(ids) + 5 * (row % 4) + 3 * t) % 90 + 5 for t in range(3 + row % 4)] for row, ids in enumerate(prompt_ids)
    ]
    return texts, None


def by_token(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def with_branches(model: Path, out: Path, size: int = 1) -> dict[str, Any]:
    """What a training on `size` processes logs by branch, its weights at the end, and what it said."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n}? " * (1 + n)}], "answer": "odd" if n % 2 else "even"}
        for n in range(4)
    ]
    said: list[str] = []

    def change(trainer: Any) -> None:
        BranchControl(trainer, Branches.model_validate(SECTION), {}, said.append)
        put_ranks_on(trainer)
        wrap(AttributeSlot(trainer, "_generate_single_turn"), written)

    grpo = {**GRPO, "per_device_train_batch_size": 8 // size, "rewards": [by_token]}
    trainer, _ = trained("none", model, rows, out / "trainer", change=change, **grpo)
    lines = [line for line in trainer.state.log_history if "kl" in line]
    kept = {"branch": [{key: line[key] for key in line if key.startswith("branch/")} for line in lines], "said": said}
    betas = next(value["beta"] for key, value in trainer.carried.items() if key.startswith("branches"))
    return {**kept, "betas": betas}


if __name__ == "__main__":
    told = with_branches(Path(sys.argv[1]), Path(sys.argv[2]), 2)
    Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(json.dumps(told), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()
