"""Whether a trainer's class does part of TRL's step in its own way: what holds of TRL's loss need not of another."""

from __future__ import annotations

from typing import Any

LOSS = ("compute_loss", "_compute_loss")
GENERATION = ("_generate_and_score_completions",)


def overridden(trainer: Any, methods: tuple[str, ...]) -> str | None:
    """The method that a subclass of `GRPOTrainer` brings along, in words; None where it has none or is ours."""
    from trl import GRPOTrainer

    for cls in type(trainer).__mro__:
        if cls is GRPOTrainer:
            return None
        if not cls.__module__.startswith("grpo_autotune."):
            for method in methods:
                if method in vars(cls):
                    return f"{cls.__name__} has a `{method}` of its own"
    return None
