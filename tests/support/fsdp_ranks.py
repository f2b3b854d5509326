"""`torchrun -m tests.support.fsdp_ranks CONFIG=FOLDER...`: each configuration trained in a folder, one after another
(`CONFIG=FOLDER+`: gone on with there), with FSDP2 on CPU processes (`tests.support.fsdp_cpu`)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import distributed

from grpo_autotune.config.schema import RunConfig
from tests.support.fsdp_cpu import allow


def facts(trainer: Any) -> dict[str, Any]:
    """What a trained model is in parts of, without what a forward has gathered."""
    from grpo_autotune.seams.fully_sharded import units
    from grpo_autotune.seams.sharding import sharding_of

    for unit in units(trainer.model):
        unit.reshard()
    kinds = sorted({type(unit).__name__ for unit in units(trainer.model)})
    return {"kinds": kinds, "held": getattr(sharding_of(trainer), "parameters", 1.0)}


def main(*pairs: str) -> None:
    from grpo_autotune.train.trainer import run_training

    allow()
    for pair in pairs:
        path, _, folder = pair.partition("=")
        trainers: list[Any] = []
        config = RunConfig.from_yaml(Path(path).read_text(encoding="utf-8"))
        run_training(config, folder.rstrip("+"), resume=folder.endswith("+"), prepare=trainers.append)
        told = json.dumps(facts(trainers[0]))
        Path(folder.rstrip("+"), f"facts{os.environ['RANK']}.json").write_text(told, encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()  # else its threads may still run when the process ends, which aborts it


if __name__ == "__main__":
    main(*sys.argv[1:])
