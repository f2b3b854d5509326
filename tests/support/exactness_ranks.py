"""Train twice on every rank, plain and sped up, and print how far weights and rewards are apart.

`torchrun ... -m tests.support.exactness_ranks MODEL FOLDER KIND LORA(0|1) GRPO_JSON NAMES`: KIND is `text` or
`picture`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from tests.support.exactness import apart, asked
from tests.support.trainers import make_trainer

from grpo_autotune.speedups.install import speed_up  # isort: skip


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Four prompts of uneven length."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for row in range(4):
        question = [{"role": "user", "content": f"{'How many are there? ' * row}What is shown?"}]
        rows.append({"prompt": question, "answer": str(row)})
        if kind == "picture":
            rows[-1]["image"] = Image.new("RGB", (56, 56), (40 * row, 90, 200 - 40 * row))
    return rows


def main() -> None:
    """One line of JSON a rank."""
    model, folder, kind, lora, grpo, names = sys.argv[1:]
    found = []
    for wanted in ("none", names):
        trainer = make_trainer(
            Path(model), rows_of(kind), Path(folder), lora=lora == "1", optim="sgd", learning_rate=0.05,
            ddp_find_unused_parameters=False, **json.loads(grpo),
        )  # fmt: skip
        speedups = speed_up(trainer, asked(wanted))
        trainer.train()
        rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
        found.append((dict(trainer.model.named_parameters()), rewards, speedups, trainer.accelerator.num_processes))
        speedups.remove()
    (plain, rewards, _, ranks), (fast, fast_rewards, speedups, _) = found
    told = {
        "ranks": ranks,
        "apart": max(apart(fast[name].detach(), plain[name].detach()) for name in plain),
        "rewards": rewards == fast_rewards,
        "on": [row.name for row in speedups.table() if row.on],
        "facts": speedups.facts(),
    }
    sys.stdout.write(f"\n{json.dumps(told)}\n")  # on a line of its own, whatever another rank has begun
    sys.stdout.flush()
    distributed.barrier()
    distributed.destroy_process_group()  # else its threads may still run when the process ends, which aborts it


if __name__ == "__main__":
    main()
