"""Silence for known lines of other libraries that a user can do nothing about: each by its text, none by its kind."""

import logging
import warnings

WARNINGS = (
    r"`\w*gradient_checkpointing\w*` is deprecated and will be removed in v6",  # TRL 1.16 uses transformers' old names
    r"You have passed exclude_modules=.* but no modules were excluded",  # the frozen tower was no target anyhow
)
"""Patterns at the start of a warning's text."""

CPU_4BIT = "bitsandbytes.backends.cpu.ops"
LOG_LINES = {
    # `import peft` imports bitsandbytes wherever it is installed; only a model in 4 bits on a CPU would use this kernel
    CPU_4BIT: "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
    "trl.trainer.grpo_trainer": "You passed `model_init_kwargs` to the `GRPOConfig`, but your model is already",
}
"""Logger -> start of the line that is dropped there."""


def drop_log_lines() -> None:
    """Drop the known lines of loggers in this process; before PEFT is imported, which writes one of them."""
    for name, start in LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(start))


def tell_dropped(name: str) -> None:
    """Write the newest line that was dropped at a logger after all: this run can use it."""
    logger = logging.getLogger(name)
    for known in logger.filters:
        if isinstance(known, _Drop) and known.dropped is not None:
            logger.callHandlers(known.dropped)
            known.dropped = None


def quieten(*, bars: bool) -> None:
    """Drop the known lines in this process; without `bars` also the progress bars of loading, mapping and saving."""
    import datasets
    from transformers.utils import logging as transformers_logging

    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    drop_log_lines()
    if not bars:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


class _Drop(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start
        self.dropped: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith(self._start):
            return True
        self.dropped = record
        return False
