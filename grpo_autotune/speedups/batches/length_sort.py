"""Micro batches of similar length: completions of one optimizer step are dealt out by length, and padding is cut off.

TRL pads every micro batch to the longest completion of the whole generation. Where the loss is a sum over rows or
tokens with a denominator of its own, the sum does not depend on which micro batch a row is in, so rows may trade places
within one optimizer step. TRL's own permutation is drawn first: the random stream stays as it was.
"""

from collections.abc import Callable
from typing import Any

from grpo_autotune.seams.table import find, slot_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.order import depends_on_partition, sort_rows, steps_line_up, wrap_while_preparing
from grpo_autotune.speedups.batches.rows import Batch, trim
from grpo_autotune.speedups.conditions import GENERATION, MICRO_BATCH, active_noise


class LengthSort:
    """The speed-up."""

    name = "length_sort"
    summary = "completions of similar length share a micro batch, cut to the longest of them"
    stands_for = (*GENERATION, *MICRO_BATCH)

    def applies(self, trainer: Any) -> str | None:
        """None where the loss of an optimizer step does not depend on its micro batches."""
        if (reason := depends_on_partition(trainer)) is not None:
            return reason
        if not steps_line_up(trainer):
            return (
                "grpo.steps_per_generation and grpo.gradient_accumulation_steps are no multiples of each other: an "
                "optimizer step would take rows of two generations"
            )
        noise = active_noise(trainer)
        return None if noise is None else f"{noise}: rows in another order would draw other random numbers"

    def install(self, trainer: Any) -> Installed:
        installed = _Sorting(self.name, trainer)
        slot_of(trainer, find("unbuffer"))  # before anything is put on
        installed.handles += sort_rows(trainer, "length")
        installed.handles += wrap_while_preparing(trainer, [(find("unbuffer"), installed.unbuffer)])
        return installed


class _Sorting(Installed):
    """Layers of one trainer, and the columns they cut."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        config = trainer.model.config.get_text_config()
        self._relative = getattr(config, "rope_parameters", None) is not None
        self.counts = {"padded_cells": 0.0, "kept_cells": 0.0}  # rows x columns as TRL padded them, and as trained on

    def unbuffer(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A micro batch without the columns that all of its rows pad."""
        batch: Batch = call_next(*args, **kwargs)
        cut = trim(batch, self.trainer.pad_to_multiple_of, prompts=self._relative)
        for name, part in (("padded_cells", batch), ("kept_cells", cut)):
            self.counts[name] += part["prompt_ids"].numel() + part["completion_ids"].numel()
        return cut
