"""`torchrun -m tests.support.pairs_ranks MODELS OUT`: plain and sped up trainings, in turns, on two processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from grpo_autotune.seams.mixed_image_rows import mend
from tests.support.pairs import gap, rewards_of, trained, weights_of

RANK = int(os.environ.get("RANK", "0"))
GROUPS = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4, "beta": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "full text": {"kind": "qwen3", "lora": False, "names": ["skip_dead", "shared_prefill", "length_sort"]},
    "full vision": {
        "kind": "qwen3_vl",
        "lora": False,
        "names": ["skip_dead", "images_once", "patch_embed"],
        "without_image": (2, 3),
    },
    "adapters": {"kind": "qwen3_vl", "lora": True, "names": "auto"},
    "whole groups": {
        "kind": "llama",
        "lora": False,
        "names": ["shared_prefix"],
        "grpo": {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.05,
            "gradient_checkpointing": True, "max_steps": 3,
        },
    },
    "a group over both": {
        "kind": "qwen3_vl",
        "lora": True,
        "names": ["shared_prefix"],
        "grpo": {"gradient_accumulation_steps": 1, "beta": 0.05, "gradient_checkpointing": False, "max_steps": 3},
    },
}  # fmt: skip


def dead_on_the_second(completions: list[Any], **kwargs: Any) -> list[float]:
    """No group of the second process has a spread, every other group of the first has one."""
    return [float(RANK == 0 and index % 8 == 0) for index in range(len(completions))]


def rows_of(kind: str, without_image: Sequence[int] = ()) -> list[dict[str, Any]]:
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for n in range(4):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"What is {n}?"}], "answer": str(n)}
        if kind.endswith("vl"):
            image = Image.new("RGB", (56, 56), (60 * n, 90, 120))
            row |= {"images": [] if n in without_image else [image]} if without_image else {"image": image}
        rows.append(row)
    return rows


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for case, what in CASES.items():
        runs = []
        for names in ("none", what["names"]):
            rows = rows_of(what["kind"], what.get("without_image", ()))
            arguments = models / what["kind"], rows, out / "trainer"
            settings = {
                "check": "always",
                "rewards": [dead_on_the_second],
                "max_steps": 5,
                **GROUPS,
                **what.get("grpo", {}),
            }
            trainer, speedups = trained(
                names, *arguments, change=mend, lora=what["lora"], ddp_find_unused_parameters=False, **settings
            )
            runs.append((rewards_of(trainer), weights_of(trainer), speedups))
        (plain_rewards, plain, _), (rewards, mine, speedups) = runs
        found[case] = {
            "same_rewards": rewards == plain_rewards,
            "gap": gap(mine, plain),
            "facts": speedups.facts(),
            "on": [row.name for row in speedups.table() if row.on],
        }
    (out / f"rank{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()  # else its threads may still run when the process ends, which aborts it


if __name__ == "__main__":
    main()
