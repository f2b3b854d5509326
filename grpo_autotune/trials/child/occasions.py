"""Seconds of what a run does every so many steps, and a probe of few steps may miss: one evaluation, one checkpoint."""

import math
import shutil
import time
from collections.abc import Mapping
from typing import Any

EVALUATION_BATCHES = 2
BYTES_PER_WEIGHT = 16
"""Of a trained weight in a checkpoint, at most: in float32 beside two moments, and something to spare."""
DISK_ROOM = 4.0


def evaluation_s(trainer: Any, batches: int | None = EVALUATION_BATCHES) -> float | None:
    """Seconds of one evaluation on all held-out rows after training, by so many `batches` of each data set, None for
    all of them; None for streamed rows."""
    args, held_out = trainer.args, trainer.eval_dataset
    data = list(held_out.values()) if isinstance(held_out, Mapping) else [held_out]
    if not all(hasattr(rows, "select") and len(rows) for rows in data):
        return None
    most = math.ceil((batches or 0) * args.eval_batch_size * args.world_size / trainer.num_generations_eval)
    total_s = 0.0
    for rows in data:
        sample = rows.select(range(min(most or len(rows), len(rows))))
        begin_s = time.perf_counter()
        trainer.evaluate(sample)
        total_s += (time.perf_counter() - begin_s) * len(rows) / len(sample)
    return total_s


def checkpoint_s(trainer: Any) -> float | None:
    """Seconds of one checkpoint after training, which is deleted again; None where the disk has little room for it."""
    folder = trainer._get_output_dir(trial=None)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    if DISK_ROOM * BYTES_PER_WEIGHT * trained > shutil.disk_usage(folder).free:
        return None
    begin_s = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    took_s = time.perf_counter() - begin_s
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        shutil.rmtree(f"{folder}/checkpoint-{trainer.state.global_step}")
    return took_s
