"""Optimizer steps of a measurement: a run stops after them, its schedule unchanged, or goes on for as many."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import TrainerCallback


class Enough(NamedTuple):
    """A run may stop early: once `steps` were done, or a multiple of `every` more, and it has trained for `seconds`.

    By this process's own clock: ranks would disagree."""

    steps: int
    every: int
    seconds: float


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ask the trainer to stop once `steps` optimizer steps, which may be raised later, were done from where it began;
    `on_step` is told each."""

    def __init__(
        self, steps: int, on_step: Callable[[int], None] = lambda done: None, enough: Enough | None = None
    ) -> None:
        self.steps, self._on_step, self._enough = steps, on_step, enough
        self._begin, self._begun_s = 0, 0.0
        self.is_reached = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin, self._begun_s = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._begin
        self._on_step(done)
        if done >= self.steps or self._is_enough(done):
            self.is_reached = control.should_training_stop = True

    def _is_enough(self, done: int) -> bool:
        if self._enough is None:
            return False
        more, rest = divmod(done - self._enough.steps, self._enough.every)
        return more >= 0 and not rest and time.monotonic() - self._begun_s >= self._enough.seconds


def outlast(trainer: Any, steps: int) -> None:
    """Let a run that is configured for fewer than `steps` optimizer steps go on that long."""
    args = trainer.args
    if 0 < args.max_steps < steps:
        args.max_steps = steps
    elif args.max_steps <= 0:
        rows = getattr(trainer.train_dataset, "__len__", lambda: 0)()
        prompts = args.generation_batch_size / trainer.num_generations
        generations = math.floor(rows / prompts) * args.num_train_epochs
        a_generation = args.steps_per_generation * trainer.num_iterations / args.gradient_accumulation_steps
        if generations * a_generation < steps:
            args.max_steps = steps
