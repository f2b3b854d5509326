"""Silence for known lines of other libraries that a user can do nothing about: each by its text, none by its kind."""

from __future__ import annotations

import logging
import warnings

import datasets
from transformers.utils import logging as transformers_logging

WARNINGS = (
    r"`\w*gradient_checkpointing\w*` is deprecated and will be removed in v6",  # TRL 1.16 uses transformers' old names
    r"You have passed exclude_modules=.* but no modules were excluded",  # the frozen tower was no target anyhow
)
"""Patterns at the start of a warning's text."""

BITSANDBYTES = "bitsandbytes.backends.cpu.ops"
"""PEFT imports bitsandbytes wherever it is installed; its kernels for 4 bits on a CPU are of no use to other runs."""

LOG_LINES = {
    BITSANDBYTES: "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
    "trl.trainer.grpo_trainer": "You passed `model_init_kwargs` to the `GRPOConfig`, but your model is already",
}
"""Logger -> start of the line that is dropped there."""


def quieten(*, bars: bool, four_bit: bool = False) -> None:
    """Drop the known lines in this process.

    Args:
        bars: False drops the progress bars of loading, mapping and saving, too.
        four_bit: True leaves what is said of kernels for weights in 4 bits.
    """
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name, start in LOG_LINES.items():
        if four_bit and name == BITSANDBYTES:
            continue
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(start))
    if not bars:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


class _Drop(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
