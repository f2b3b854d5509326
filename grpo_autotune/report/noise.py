"""Intervals of a ratio of seconds between two runs that did not run at once.

The logarithm of a run's seconds is off by the scatter of its steps, which a bootstrap in blocks measures (steps that
follow each other are alike), and by the machine's pace in that hour, which no number of its steps can show. So a drift
is assumed of every run: `DRIFT_*`, or half of the variance of its own cycles, as a pace that wanders during a run
wanders between runs. Repeated runs are then told apart in at most 1 - confidence of the cases, as long as the pace
differs by no more; a machine twice as fast for all of one run looks like a change, which only runs in turns tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

DRIFT_CPU = 0.14
"""Standard deviation of the logarithm of a run's pace on cores that others may share. Windows of 5, 10 and 30 steps of
five runs of the demo's one configuration, on two such cores, have medians with a deviation of 0.13, 0.11 and 0.10; of
the pairs of windows from different runs 2.4%, 1.4% and none are told apart at 90%."""
DRIFT_GPU = 0.02
"""The same of a GPU of one's own, whose clock follows temperature and power; an assumption."""
DRIFT_PER_SPREAD = 0.7 / 1.349
"""Least drift over the distance between the quartiles of a run's cycles (1.349 standard deviations of a normal one)."""
RESAMPLES = 500
MOST_CYCLES = 1024


class Noise:
    """The error of `log_seconds` (from indices of cycles, in the last axis) of a run of so many cycles, whose pace
    drifts by at least `drift`, a standard deviation."""

    def __init__(self, log_seconds: Callable[[np.ndarray], np.ndarray], cycles: int, drift: float) -> None:
        count = min(cycles, MOST_CYCLES)
        block = int(count ** (1 / 3))
        self._blocks = -(-count // block)
        starts = np.random.default_rng(0).integers(0, count, (RESAMPLES, self._blocks, 1))
        chosen = ((starts + np.arange(block)) % count).reshape(RESAMPLES, -1)[:, :count]
        self.scatter = float(np.std(log_seconds(chosen + cycles - count)))
        low, high = np.quantile(log_seconds(np.arange(cycles - count, cycles)[:, None]), (0.25, 0.75))
        self.drift = max(drift, DRIFT_PER_SPREAD * float(high - low))

    def half_width(self, confidence: float) -> float:
        """Half of the interval's length: Student's for few blocks, normal for the drift."""
        tail = (1.0 + confidence) / 2.0
        student = float(stdtrit(self._blocks - 1, tail)) if self._blocks > 1 else math.inf
        return math.hypot(
            student * self.scatter if self._blocks > 1 else student, NormalDist().inv_cdf(tail) * self.drift
        )


def change_interval(log_ratio: float, before: Noise, after: Noise, confidence: float) -> list[float] | None:
    """Lower end, middle and upper end of a relative change; None where a run is too short to have one."""
    half = math.hypot(before.half_width(confidence), after.half_width(confidence))
    return [math.expm1(log_ratio + end) for end in (-half, 0.0, half)] if half < math.log(1e6) else None
