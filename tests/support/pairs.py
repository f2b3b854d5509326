"""What the tests of the speed-ups share: two trainers of one seed, one plain and one sped up, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.speedups.install import Check, SpeedUps, speed_up
from tests.support.trainers import make_trainer


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rewards_of(trainer: Any) -> list[float]:
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


def trained(
    names: Any, *args: Any, change: Callable[[Any], None] | None = None, check: Check = "auto", **kwargs: Any
) -> tuple[Any, SpeedUps]:
    """A trainer made by `make_trainer(*args, **kwargs)`, sped up by `names`, after its training.

    With plain gradient descent, so that weights differ by what gradients differ: Adam blows rounding up to whole steps
    wherever a gradient is nothing but rounding.
    """
    trainer = make_trainer(*args, **{"optim": "sgd", "learning_rate": 0.05, **kwargs})
    if change is not None:
        change(trainer)
    speedups = speed_up(trainer, names, check=check)
    trainer.train()
    return trainer, speedups


def patched(trainer: Any) -> list[Any]:
    """Everything that a layer might be left on."""
    import trl.trainer.grpo_trainer as grpo_module

    owners = [trainer, trainer.accelerator, trainer.processing_class, grpo_module, *trainer.model.modules()]
    image_processor = getattr(trainer.processing_class, "image_processor", None)
    kept = [{key: value for key, value in vars(owner).items() if callable(value)} for owner in owners]
    return [*kept, list(trainer.reward_funcs), type(trainer.processing_class), type(image_processor)]
