"""Optimizer steps without a learning signal: why and for how long, told once for each cause while training goes on."""

from collections import deque
from collections.abc import Callable
from typing import Any

from grpo_autotune.probe.facts import KEEP
from grpo_autotune.records.probe import NO_SIGNAL, SAVES_NOTHING
from grpo_autotune.units import seconds

PATIENCE = 3
"""Cycles of generating and reusing in a row before it is told."""


class SignalWatch:
    """The watch over one trainer's steps; `zero` holds of the newest ones whether their gradient was zero, and
    `unexplained` whether it was so for no cause that is known."""

    def __init__(self, trainer: Any, cycle: int, say: Callable[[str], None]) -> None:
        self._trainer, self._say = trainer, say
        self.zero, self.unexplained = deque[bool](maxlen=KEEP), deque[bool](maxlen=KEEP)
        self._told: set[str] = set()
        self._cause, self._steps_s = "", deque[float](maxlen=PATIENCE * cycle)
        if trainer.args.save_strategy == "best" and trainer.args.eval_strategy == "no":
            say(SAVES_NOTHING)

    def see(self, grad_norm: Any, step_s: float, *, all_cut: bool, all_equal: bool, failed: bool = False) -> None:
        """Take a step: its gradient's norm (None if unknown), its seconds, whether every completion was cut off,
        whether no group's rewards differ, and whether most completions have none. Where the rewards are equal the KL
        term alone may give a gradient."""
        zero = grad_norm is not None and float(grad_norm) == 0.0
        masked = all_cut and self._trainer.mask_truncated_completions
        cause = "masked" if masked else "failed" if failed else "equal" if all_equal else "zero"
        if not zero and (self._trainer.beta == 0.0 or cause == "zero"):
            cause = ""
        if cause != self._cause:
            self._steps_s.clear()
        self.zero.append(zero)
        self.unexplained.append(zero and cause == "zero")
        self._cause = cause
        self._steps_s.append(step_s)
        if cause and cause not in self._told and len(self._steps_s) == self._steps_s.maxlen:
            self._told.add(cause)
            spent = f"{len(self._steps_s)} steps, {seconds(sum(self._steps_s))}"
            self._say(f"the last {spent}, taught nothing: {NO_SIGNAL[cause]}")
