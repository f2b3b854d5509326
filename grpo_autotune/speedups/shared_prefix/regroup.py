"""Completions of one prompt into one micro batch, as far as that changes nothing.

TRL shuffles a generation batch before it cuts it into micro batches. Its own permutation is drawn first, so that the
random stream and every later rollout stay as they are; then rows are sorted by group, stably, inside the micro batches
of one optimizer step, whose gradients are summed anyhow. Where the loss of a micro batch depends on which rows are in
it, nothing is moved. Metrics that TRL averages over micro batches (entropy, kl, clip ratios) are averages of other
parts of the same rows then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER, Handle
from grpo_autotune.seams.table import PREPARE_INPUTS, find, wrap_rows
from grpo_autotune.speedups.batches.groups import KEY
from grpo_autotune.speedups.conditions import LOSS, overridden

ADDITIVE = {"grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"}
"""Values of `loss_type` whose sum over equal micro batches is the same however rows are dealt (TRL 1.16,
`_compute_loss`); `bnpo` divides by the tokens of the micro batch."""


def depends_on_partition(trainer: Any) -> bool:
    """Whether the loss of an optimizer step depends on which rows share a micro batch."""
    return bool(
        trainer.loss_type not in ADDITIVE
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled
        or trainer.aux_loss_enabled
        or overridden(trainer, LOSS) is not None
    )


def window(trainer: Any) -> int:
    """Micro batches, from the first of a generation, that always belong to one optimizer step; 1 if none do."""
    generation, step = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    if step % generation == 0:
        return int(generation)
    return int(step) if generation % step == 0 else 1


def sorted_inside(groups: list[int], size: int) -> list[int]:
    """The order of rows that brings groups together within each `size` rows; groups in order of appearance."""
    order: list[int] = []
    for begin in range(0, len(groups), size):
        members: dict[int, list[int]] = {}
        for row in range(begin, min(begin + size, len(groups))):
            members.setdefault(groups[row], []).append(row)
        order += [row for rows in members.values() for row in rows]
    return order


def wrap_shuffle(trainer: Any) -> list[Handle]:
    """Have TRL's shuffle end in groups for this trainer; nothing where the loss depends on the partition.

    The shuffle is a function of TRL's module, so the layer is on it only while this trainer prepares its inputs.
    """
    if depends_on_partition(trainer):
        return []

    def shuffle(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        found = call_next(*args, **kwargs)
        if found.get(KEY) is None:
            return found
        micro_batch = len(found[KEY]) // trainer.args.steps_per_generation
        order = sorted_inside(found[KEY].tolist(), micro_batch * window(trainer))
        return {key: _in_order(value, order) for key, value in found.items()}

    def prepare(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        handles = wrap_rows(trainer, [(find("shuffle"), shuffle)], INNER)
        try:
            return call_next(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return wrap_rows(trainer, [(PREPARE_INPUTS, prepare)], INNER)


def _in_order(value: Any, order: list[int]) -> Any:
    if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return value
    return value[order] if isinstance(value, torch.Tensor) else [value[row] for row in order]
