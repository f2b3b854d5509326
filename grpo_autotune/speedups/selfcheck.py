"""A speed-up is compared with the plain path once, on first use, and leaves the work to TRL where the two disagree."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.speedups.base import Installed

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest root mean square of the difference, relative to that of the plain values (at least 1)."""

FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model that a speed-up was not made for may raise.

Memory that ran out and a GPU that failed are `RuntimeError`s too, and say nothing about the model: whoever catches
these raises those again (`is_of_the_machine`).
"""


class SelfCheck:
    """The decision whether a speed-up may be used, taken at its first use.

    Attributes:
        passed: None until it was tried.
        difference: The relative difference that was found.
    """

    def __init__(self, installed: Installed) -> None:
        self._installed = installed
        self.passed: bool | None = None
        self.difference = 0.0

    def run(
        self, plain: Callable[[], torch.Tensor], fast: Callable[[], torch.Tensor], dtype: torch.dtype, what: str
    ) -> bool:
        """Compute both without gradients, compare, and take the speed-up back on a mismatch.

        Args:
            plain: The values as TRL computes them.
            fast: The same values by the speed-up.
            dtype: What matrix products run in.
            what: What is compared, for the message.

        Raises:
            RuntimeError: Memory ran out, or the GPU failed.
        """
        if self.passed is None:
            self.passed = self._agree(plain, fast, dtype, what)
        return self.passed

    def _agree(
        self, plain: Callable[[], torch.Tensor], fast: Callable[[], torch.Tensor], dtype: torch.dtype, what: str
    ) -> bool:
        with torch.no_grad():
            wanted = plain().double()
            try:
                values = fast().double()
            except FAILURES as error:
                if is_of_the_machine(error):
                    raise
                self._installed.fall_back(f"its self-check failed: {type(error).__name__}: {first_line(error)}")
                return False
        if values.shape != wanted.shape:
            self._installed.fall_back(f"its self-check found {what} of shape {tuple(values.shape)}")
            return False
        self.difference = relative_difference(values, wanted)
        limit = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
        if not self.difference <= limit:  # also where it is not a number
            self._installed.fall_back(f"its self-check found {what} off by {self.difference:.1e} (limit {limit:.0e})")
            return False
        return True


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of `wanted`, or over 1 where that is smaller."""
    if not wanted.numel():
        return 0.0
    difference = (found - wanted).square().mean().sqrt()
    return float(difference / wanted.square().mean().sqrt().clamp(min=1.0))


def first_line(error: BaseException) -> str:
    """The message of an error, cut to its first line."""
    return next(iter(str(error).splitlines()), "")
