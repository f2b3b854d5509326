"""Micro batches of similar length: completions of one optimizer step are dealt out by length, and padding is cut off.

TRL pads every micro batch to the longest completion of the whole generation. Where the loss is a sum over rows or
tokens with a denominator of its own, the sum does not depend on which micro batch a row is in, so rows may trade places
within one optimizer step. TRL's own permutation is drawn first: the random stream stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER
from grpo_autotune.seams.table import PREPARE_INPUTS, find, wrap_rows
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.rows import Batch, lengths, trim
from grpo_autotune.speedups.conditions import LOSS, active_dropout, overridden

DEPENDS_ON_PARTITION = ("bnpo",)


class LengthSort:
    """The speed-up."""

    name = "length_sort"
    summary = "completions of similar length share a micro batch, cut to the longest of them"

    def applies(self, trainer: Any) -> str | None:
        """None where the loss of an optimizer step does not depend on its micro batches."""
        if trainer.loss_type in DEPENDS_ON_PARTITION:
            return f"grpo.loss_type {trainer.loss_type} divides by the tokens of each micro batch"
        if trainer._entropy_bonus_enabled:
            return "grpo.entropy_coef or grpo.use_adaptive_entropy takes a mean over each micro batch"
        if trainer.aux_loss_enabled:
            return "grpo.router_aux_loss_coef takes a mean over each micro batch"
        if trainer.top_entropy_quantile < 1.0:
            return "grpo.top_entropy_quantile takes its threshold from each micro batch"
        if _window(trainer) is None:
            return (
                "grpo.steps_per_generation and grpo.gradient_accumulation_steps are no multiples of each other: an "
                "optimizer step would take rows of two generations"
            )
        other = overridden(trainer, LOSS)
        if other is not None:
            return f"{other}, which may depend on the micro batch"
        dropout = active_dropout(trainer.model)
        return None if dropout is None else f"{dropout}: rows in another order would draw other random numbers"

    def install(self, trainer: Any) -> Installed:
        """Put layers behind TRL's shuffle and its split into micro batches."""
        installed = _Sorting(self.name, trainer)
        layers = (
            (PREPARE_INPUTS, installed.prepare),
            (find("shuffle"), installed.shuffle),
            (find("unbuffer"), installed.unbuffer),
        )
        installed.handles += wrap_rows(trainer, layers, INNER)
        return installed


def _window(trainer: Any) -> int | None:
    """Micro batches of one generation that share an optimizer step; None where the two do not line up."""
    generation, step = trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps
    if step % generation == 0:
        return int(generation)
    return int(step) if generation % step == 0 else None


class _Sorting(Installed):
    """Layers of one trainer, and the columns they cut."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        config = trainer.model.config.get_text_config()
        self._relative = getattr(config, "rope_parameters", None) is not None
        self._cells = self._kept = 0
        self._preparing = False

    def facts(self) -> dict[str, float]:
        """Cells (rows x columns) of the micro batches as TRL padded them, and as they were trained on."""
        return {"padded_cells": float(self._cells), "kept_cells": float(self._kept)}

    def prepare(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Tell this trainer's shuffle and split from those of others in this process."""
        self._preparing = True
        try:
            return call_next(*args, **kwargs)
        finally:
            self._preparing = False

    def shuffle(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """TRL's permutation, and within each optimizer step the longest rows first."""
        batch: Batch = call_next(*args, **kwargs)
        window = _window(self.trainer)
        if not self._preparing or window is None:
            return batch
        rows = len(batch["completion_mask"])
        size = rows // self.trainer.args.steps_per_generation * window
        totals_B = lengths(batch)
        order: list[int] = []
        for first in range(0, rows, size):
            longest_first = torch.argsort(totals_B[first : first + size], descending=True, stable=True)
            order += (longest_first + first).tolist()
        return {key: _reordered(value, order) for key, value in batch.items()}

    def unbuffer(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A micro batch without the columns that all of its rows pad."""
        batch: Batch = call_next(*args, **kwargs)
        if not self._preparing:
            return batch
        cut = trim(batch, self.trainer.pad_to_multiple_of, prompts=self._relative)
        self._cells += batch["prompt_ids"].numel() + batch["completion_ids"].numel()
        self._kept += cut["prompt_ids"].numel() + cut["completion_ids"].numel()
        return cut


def _reordered(value: Any, order: list[int]) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.ndim == 0 else value[order]
    return value if value is None else [value[row] for row in order]
