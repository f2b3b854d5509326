"""Rows of a TRL batch: some of them taken out, and the padding that no row of a micro batch needs cut off.

Legend: B rows, P prompt columns (padded on the left), C completion columns (padded on the right).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from grpo_autotune.seams.trainer_access import BOTH_KEYS, IMAGE_KEYS
from grpo_autotune.speedups.batches.groups import KNOWN

Batch = dict[str, Any]

PROMPT_KEYS = ("prompt_ids", "prompt_mask")
COMPLETION_KEYS = (
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps",
    "sampling_per_token_logps", "importance_sampling_ratio", "advantages",
)  # fmt: skip


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch made of `rows` alone, images included; single numbers of the whole generation stay as they are."""
    parts = split_pixel_values_by_grid(batch)
    taken = {key: rows_of(value, list(rows)) for key, value in parts.items()}
    whole: Batch = unsplit_pixel_values_by_grid(taken)
    return whole


def rows_of(value: Any, rows: list[int]) -> Any:
    """These rows of a batch's value, in this order; a number of the whole generation as it is."""
    if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return value
    return value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]


def lengths(batch: Batch) -> Any:
    """Prompt and completion tokens of each row together, shape (B,)."""
    return batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)


def trim(batch: Batch, multiple: int | None = None, *, prompts: bool = True) -> Batch:
    """Cut off the columns that are padding in every row; P and C stay multiples of `multiple` (`pad_to_multiple_of`).
    The prompts' padding may go as well, but where positions are absolute."""
    width_P, width_C = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    keep_P = _longest(batch["prompt_mask"], multiple) if prompts else width_P
    keep_C = _longest(batch["completion_mask"].flip(1), multiple)
    return batch if keep_P == width_P and keep_C == width_C else _cut(batch, keep_P, keep_C)


def _cut(batch: Batch, keep_P: int, keep_C: int) -> Batch:
    """The last columns of the prompts, and the first of the completions."""
    width_P, width_C = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    cut = dict(batch)
    for key in PROMPT_KEYS:
        cut[key] = batch[key][:, width_P - keep_P :]
    for key in COMPLETION_KEYS:
        value = batch.get(key)
        if value is not None and value.ndim == 2 and value.shape[1] == width_C:
            cut[key] = value[:, :keep_C]
    for key in BOTH_KEYS:
        if batch.get(key) is not None:
            cut[key] = batch[key][:, width_P - keep_P : width_P + keep_C]
    return cut


def widened(batch: Batch, pad_token: int) -> Batch:
    """Inputs of a model, or a micro batch, with one more column of padding before them: the same results, up to
    rounding."""
    values = {"input_ids": pad_token, "prompt_ids": pad_token}
    values |= dict.fromkeys(("attention_mask", "prompt_mask", *BOTH_KEYS), 0)
    return {
        key: functional.pad(value, (1, 0), value=values[key]) if key in values and value is not None else value
        for key, value in batch.items()
    }


def one_token(row: Batch, *, whole_prompt: bool) -> Batch:
    """A batch of one row cut to its first completion token, behind the whole prompt or behind its last token."""
    gone = {KNOWN} if whole_prompt else {KNOWN, *IMAGE_KEYS}
    kept = {name: value for name, value in row.items() if name not in gone}
    return _cut(kept, row["prompt_ids"].shape[1] if whole_prompt else 1, 1)


def _longest(mask_left_padded: Any, multiple: int | None) -> int:
    """Columns from the first one that some row uses to the end, at least one."""
    used = mask_left_padded.any(dim=0).int()
    width = int(used.numel())
    longest = max(1, width - int(used.argmax())) if bool(used.any()) else 1
    if multiple:
        longest = -(-longest // multiple) * multiple
    return min(width, longest)
