"""Stop a training run after so many optimizer steps, without changing its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ask the trainer to stop once `steps` optimizer steps were done, counted from where it began.

    Args:
        steps: Optimizer steps.
        on_step: Called with the number done after each.
    """

    def __init__(self, steps: int, on_step: Callable[[int], None] = lambda done: None) -> None:
        self._steps, self._on_step = steps, on_step
        self._begin = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._begin
        self._on_step(done)
        if done >= self._steps:
            control.should_training_stop = True
