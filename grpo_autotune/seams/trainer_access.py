"""Facts that engine, probe and speed-ups read off a trainer."""

from __future__ import annotations

from collections.abc import Iterator
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


def base_of(model: Any) -> Any:
    """The transformers model itself, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def models_of(trainer: Any) -> Iterator[Any]:
    """The policy, and the reference model where there is one."""
    yield trainer.model
    if getattr(trainer, "ref_model", None) is not None:
        yield trainer.ref_model
