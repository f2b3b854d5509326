"""The peak of memory: the formula's increment, scaled and shifted to what was measured on this machine.

measured peak - idle = a * formula + b,   a around 1, b >= 0: what the libraries and the allocator keep beside
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import lsq_linear

from grpo_autotune.estimate.memory import memory
from grpo_autotune.search.workload import Workload

NOISE = 0.05
"""Relative standard deviation of a measured increment."""

SCALE_SPREAD = 0.3
"""Standard deviation of `a` around 1 before anything was measured."""

SHIFT_SHARE = 0.3
"""Standard deviation of `b` before anything was measured, as a share of the first increment."""

UNMEASURED_SPREAD = 0.3


class PeakSeen(NamedTuple):
    """One trial's memory; `at_least`: it ran out, so that it would have taken more."""

    load: Workload
    increment: float
    idle: float
    at_least: bool


class PeakGuess(NamedTuple):
    """Bytes beyond idle with their relative standard deviation, and the idle process's."""

    increment: float
    spread: float
    idle: float


@dataclass(frozen=True)
class PeakFit:
    """The scale and the shift that fit the trials."""

    seen: tuple[PeakSeen, ...]

    @cached_property
    def _line(self) -> tuple[float, float]:
        known = [one for one in self.seen if not one.at_least]
        if not known:
            return 1.0, 0.0
        formulas = np.array([increment(one.load) for one in known])
        measured = np.array([float(one.increment) for one in known])
        first = max(measured[0], 1.0)
        rows = np.column_stack([formulas / measured, first / measured]) / NOISE
        priors = np.array([[1.0 / SCALE_SPREAD, 0.0], [0.0, 1.0 / SHIFT_SHARE]])
        target = np.concatenate([np.full(len(known), 1.0 / NOISE), [1.0 / SCALE_SPREAD, 0.0]])
        found = lsq_linear(np.vstack([rows, priors]), target, bounds=([0.2, 0.0], [5.0, np.inf])).x
        return float(found[0]), float(found[1]) * first

    def predict(self, load: Workload) -> PeakGuess:
        """Bytes that a configuration needs; never less than one that needed less by the formula and ran out."""
        scale, shift = self._line
        formula = increment(load)
        found = scale * formula + shift
        for one in self.seen:
            if one.at_least and formula >= increment(one.load):
                found = max(found, one.increment * formula / max(increment(one.load), 1.0))
        idle = statistics.median(one.idle for one in self.seen) if self.seen else 0.0
        off = [math.log((scale * increment(s.load) + shift) / s.increment) for s in self.seen if not s.at_least]
        spread = math.sqrt((UNMEASURED_SPREAD**2 + math.fsum(e * e for e in off)) / (1 + len(off)))
        return PeakGuess(found, spread, idle)


def increment(load: Workload) -> float:
    """The formula's bytes beyond an idle process; for an architecture without formulas, of its weights alone."""
    if load.shape is None:
        training = load.facts.training
        return float(
            load.trainer["parameters"] * training.weight_bytes + training.trainable * 4 * training.trainable_bytes
        )
    return memory(load.shape, load.facts, load.sizes).peak
