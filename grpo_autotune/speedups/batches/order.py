"""The order of rows behind TRL's shuffle: by group, by length, or by both, within an optimizer step.

TRL shuffles a generation batch before it cuts it into micro batches. Its own permutation is drawn first, so that the
random stream and every later rollout stay as they are; then rows are sorted, stably, inside the micro batches of one
optimizer step, whose gradients are summed anyhow. Where the loss of a micro batch depends on which rows are in it,
nothing is moved. Metrics that TRL averages over micro batches (entropy, kl, clip ratios) are averages of other parts of
the same rows then.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from grpo_autotune.hardware.versions import unheld_trl
from grpo_autotune.seams.layers import INNER, Handle, Layer, Next, take_off
from grpo_autotune.seams.loss import micro_batch_terms_of
from grpo_autotune.seams.table import PREPARE_INPUTS, Seam, find, slot_of, wrap_rows
from grpo_autotune.speedups.batches.groups import KEY
from grpo_autotune.speedups.batches.rows import Batch, lengths, rows_of
from grpo_autotune.speedups.conditions import MICRO_BATCH, foreign_hook, overridden

SortKey = Literal["group", "length"]

_ATTRIBUTE = "_grpo_autotune_order"


def depends_on_partition(trainer: Any) -> str | None:
    """The reason why the loss of a step depends on which rows share a micro batch; None where it does not."""
    terms = micro_batch_terms_of(trainer)
    if terms:
        return terms[0].reason
    if (untried := unheld_trl()) is not None:
        return f"{untried}: its loss may depend on the micro batch"
    other = overridden(trainer, MICRO_BATCH) or foreign_hook(trainer.model)
    return None if other is None else f"{other}, which may depend on the micro batch"


def steps_line_up(trainer: Any) -> bool:
    """True if no optimizer step takes rows of a part of one generation and of another."""
    generation, step = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    return bool(step % generation == 0 or generation % step == 0)


def window(trainer: Any) -> int:
    """Micro batches, from the first of a generation, that always belong to one optimizer step."""
    args = trainer.args
    return min(args.steps_per_generation, args.gradient_accumulation_steps) if steps_line_up(trainer) else 1


def window_ends(trainer: Any) -> bool:
    """True in the last micro batch of such a window, or of an epoch's last step."""
    return bool(trainer.accelerator.sync_gradients or (trainer._step + 1) % window(trainer) == 0)


def sorted_inside(size: int, groups: Sequence[int] | None, lengths: Sequence[int] | None) -> list[int]:
    """The order of rows sorted within each `size` of them: the longest first, then groups together, in the order of
    their first row; None for the groups of rows that may be apart, and for lengths that do not matter."""
    order: list[int] = []
    count = len(groups if groups is not None else lengths or ())
    for begin in range(0, count, size):
        rows = list(range(begin, min(begin + size, count)))
        if lengths is not None:
            rows.sort(key=lambda row: -lengths[row])
        if groups is not None:
            members: dict[int, list[int]] = {}
            for row in rows:
                members.setdefault(groups[row], []).append(row)
            rows = [row for group in members.values() for row in group]
        order += rows
    return order


def wrap_while_preparing(trainer: Any, layers: Iterable[tuple[Seam, Layer]]) -> list[Handle]:
    """Put layers on functions of TRL's module, which tell no trainer from another, while this one prepares its
    inputs."""
    rows = tuple(layers)
    for row, _ in rows:
        slot_of(trainer, row)  # said now, if the installed version lacks it

    def prepare(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        handles = wrap_rows(trainer, rows, INNER)
        try:
            return call_next(*args, **kwargs)
        finally:
            take_off(handles)

    return wrap_rows(trainer, [(PREPARE_INPUTS, prepare)], INNER)


class RowOrder:
    """The one layer on a trainer's shuffle, there as long as a speed-up asks for a key."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.keys: list[SortKey] = []
        self._handles = wrap_while_preparing(trainer, [(find("shuffle"), self._shuffle)])
        setattr(trainer, _ATTRIBUTE, self)

    def drop(self, key: SortKey) -> None:
        self.keys.remove(key)
        if not self.keys:
            take_off(self._handles)
            delattr(self._trainer, _ATTRIBUTE)

    def _shuffle(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        batch: Batch = call_next(*args, **kwargs)
        groups = batch[KEY].tolist() if "group" in self.keys and batch.get(KEY) is not None else None
        widths = lengths(batch).tolist() if "length" in self.keys else None
        if (groups is None and widths is None) or depends_on_partition(self._trainer) is not None:
            return batch
        rows = len(groups if groups is not None else widths or ())
        size = rows // self._trainer.args.steps_per_generation * window(self._trainer)
        order = sorted_inside(size, groups, widths)
        return {key: rows_of(value, order) for key, value in batch.items()}


class _Sorted:
    """One key of one speed-up."""

    def __init__(self, order: RowOrder, key: SortKey) -> None:
        self._order: RowOrder | None = order
        self._key = key
        order.keys.append(key)

    def remove(self) -> None:
        if self._order is not None:
            self._order.drop(self._key)
            self._order = None


def sort_rows(trainer: Any, key: SortKey) -> list[_Sorted]:
    """Have TRL's shuffle end in rows sorted by a key, beside those asked for before; the loss must allow it."""
    order = getattr(trainer, _ATTRIBUTE, None)
    return [_Sorted(RowOrder(trainer) if order is None else order, key)]
