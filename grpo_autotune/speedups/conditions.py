"""Conditions of a trainer that several speed-ups ask about: dropout, and methods of its own.

Where a model drops activations at random, a row's numbers depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def active_dropout(model: Any) -> str | None:
    """The key that keeps dropout on in `model`, in words; None where nothing is dropped."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{_key(name)} is {module.p:g}"
        rate = getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            return f"the model's attention_dropout is {rate:g}"
    return None


def _key(name: str) -> str:
    return "peft.lora_dropout" if "lora_dropout" in name else f"grpo.disable_dropout is false and the dropout of {name}"


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
