"""What probe and speed-ups both read off a trainer."""

from __future__ import annotations

from typing import Any

SPEED_UPS = "_grpo_autotune_speed_ups"
"""Attribute of a trainer that holds what `speed_up` put on it."""


def compute_dtype(trainer: Any) -> str:
    """Name of the dtype matrix products run in: autocast's where it is on, else the weights'."""
    if trainer.args.bf16:
        return "bfloat16"
    if trainer.args.fp16:
        return "float16"
    return str(trainer.model.dtype).removeprefix("torch.")
