"""A speed-up is compared with the plain path once, on first use, and leaves the work to TRL where the two disagree."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.hardware.seeded import random_streams
from grpo_autotune.seams.first_use import first_use
from grpo_autotune.seams.ranks import InStep
from grpo_autotune.speedups.base import Installed

Values = Callable[[], torch.Tensor]
"""A computation, made when it is called."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest root mean square of the difference, relative to that of the plain values (at least 1), where nothing tells
how much of it is rounding."""

LEAST = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""The same that passes whatever rounding there is: an eighth of half precision's own."""

LAST_BIT = 0.35
"""Share of the last bit of the values themselves that passes as well: it differs by chance."""

TIMES = 3.0
"""How many times as far apart as two plain computations it may be: a shared prompt is 1 to 2 times, and with positions
that are off by one 4 to 14 times (8 to 24 layers in bfloat16 on a CPU)."""

FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What a model that a speed-up was not made for may raise. Memory that ran out and a GPU that failed are
`RuntimeError`s too, and say nothing about it: whoever catches these raises those again (`is_of_the_machine`)."""


class SelfCheck:
    """The decision whether a speed-up may be used, taken at its first use; by all `ranks` together while they
    are in step."""

    def __init__(self, installed: Installed, ranks: InStep | None = None) -> None:
        self._installed = installed
        self._any_rank: Callable[[bool], bool] = ranks.any if ranks else bool
        self._passing: Callable[[], AbstractContextManager[None]] = ranks.passing if ranks else nullcontext
        self.passed: bool | None = None  # None until it was tried
        self.difference = 0.0  # the relative one

    def run(self, plain: Values, fast: Values, dtype: torch.dtype, what: str, again: Values | None = None) -> bool:
        """Compute `what` without gradients as TRL does and by the speed-up, which is taken back on a mismatch; `again`
        is the plain values computed in another way, off by rounding alone: the yardstick. Products run in `dtype`.

        What is drawn, as somebody's own noise does, is drawn again by whatever comes next. A `RuntimeError` is memory
        that ran out, or a GPU that failed."""
        if self.passed is None:
            streams_back, caching = random_streams(), torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(
                False
            )  # older torch would keep casts of weights that let no gradient through
            try:
                with first_use():
                    self.passed = self._agree(plain, fast, dtype, what, again)
            finally:
                torch.set_autocast_cache_enabled(caching)
                streams_back()
        return self.passed

    def _agree(self, plain: Values, fast: Values, dtype: torch.dtype, what: str, again: Values | None) -> bool:
        failed = None  # a rank that fails goes on to where the others wait for it
        with torch.no_grad():
            first = plain()
            wanted = values = first.double()
            try:
                with self._passing():
                    values = fast().double()
            except FAILURES as error:
                if is_of_the_machine(error):
                    raise
                failed = f"its self-check failed: {type(error).__name__}: {first_line(error)}"
        if values.shape != wanted.shape:
            failed = f"its self-check found {what} of shape {tuple(values.shape)}"
        self.difference = math.inf if failed else relative_difference(values, wanted)
        most = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
        last_bit = LAST_BIT * torch.finfo(first.dtype).eps  # FSDP2 rounds what a model returns
        limit = most if again is None else max(LEAST.get(dtype, most), last_bit)
        if again is not None and self._any_rank(not self.difference <= limit):
            with torch.no_grad():
                rounding = relative_difference(again().double(), wanted)
            limit = max(limit, TIMES * rounding) if rounding <= most else most  # else noise, or a mask that is not read
        differs = not self.difference <= limit  # also where it is not a number
        if not self._any_rank(differs):
            return True
        off = f"off by {self.difference:.1e} (limit {limit:.0e})" if differs else "off on another rank"
        self._installed.fall_back(failed or f"its self-check found {what} {off}")
        return False


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The type in which autocast multiplies on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of `wanted`, or over 1 where that is smaller."""
    if not wanted.numel():
        return 0.0
    difference = (found - wanted).square().mean().sqrt()
    return float(difference / wanted.square().mean().sqrt().clamp(min=1.0))


def first_line(error: BaseException) -> str:
    """The message of an error, cut to its first line."""
    return next(iter(str(error).splitlines()), "")
