"""A command with too little memory: `python -m tests.support.narrow COMMAND...` runs `grpo-autotune COMMAND...`.

From step `NARROW_STEP` on, each row of a micro batch takes `ROW_BYTES` of addresses while it is trained on, as its
activations would, and the process has a limit on addresses (`RLIMIT_AS`) under which `NARROW_ROWS` rows fit. With
`NARROW_RANK` the limit is that rank's alone. The limit is the process's: it stays where the command begins anew.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

import psutil

ROW_BYTES = 1 << 30


def limit(rows: int) -> None:
    """Leave room for half a row more than fits, beside what the process holds."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        most = psutil.Process().memory_info().vms + rows * ROW_BYTES + ROW_BYTES // 2
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def press() -> None:
    """Make rows of training large, and room for them small."""
    import torch

    from grpo_autotune.train.runs.resumable import ResumableTrainer

    step, rows = int(os.environ["NARROW_STEP"]), int(os.environ["NARROW_ROWS"])
    here = os.environ.get("NARROW_RANK", os.environ.get("RANK")) == os.environ.get("RANK")
    plain = ResumableTrainer.compute_loss

    def compute_loss(trainer: Any, model: Any, inputs: Any, **kwargs: Any) -> Any:
        held = None
        if here and trainer.state.global_step + 1 >= step:
            limit(rows)
            held = torch.empty(len(inputs["completion_ids"]) * ROW_BYTES, dtype=torch.uint8)
        loss = plain(trainer, model, inputs, **kwargs)
        del held
        return loss

    ResumableTrainer.compute_loss = compute_loss


if __name__ == "__main__":
    press()
    from grpo_autotune.cli.main import main

    sys.exit(main(sys.argv[1:]))
