"""Intervals of a ratio of seconds between two runs that did not run at once.

The logarithm of each run's seconds is off by two independent amounts: the scatter of its steps, and the machine's pace
in that hour. The scatter is measured: a bootstrap of the run's cycles in blocks, so that cycles that follow each other
stay together, widened as Student's t is for few of them. The pace is not: two runs are two draws of it, and no number
of steps in one tells how far the other is off. So a drift is assumed of every run, the largest of what is known of it:
`DRIFT_*`, and half of the variance of the run's own cycles, as a pace that wanders during a run wanders between runs.

So two runs of one thing are told apart in at most 1 - confidence of the cases, as long as the pace differs between runs
by no more than that. A machine that was twice as fast for the whole of one run looks like a faster run; only runs in
turns tell the two apart, as in the race of `search`.
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
"""The same of a GPU of one's own, whose clock follows temperature and power."""
RESAMPLES = 500
"""For a standard deviation, which they give to 3%."""
MOST_CYCLES = 1024
"""The newest that are resampled."""
DRIFT_PER_SPREAD = 0.7
"""Least drift over the spread of a run's own cycles: about half of their variance is taken to be pace."""
QUARTILES = 1.349
"""Between the quartiles of a normal distribution, in standard deviations."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""From indices of cycles, in the last axis, to the logarithm of seconds."""


class Noise:
    """The error of the logarithm of a run's seconds.

    Args:
        statistic: The logarithm of the seconds that a selection of cycles gives.
        cycles: Cycles that were measured.
        drift: Least drift between runs, as a standard deviation of the logarithm.
    """

    def __init__(self, statistic: Statistic, cycles: int, drift: float) -> None:
        count = min(cycles, MOST_CYCLES)
        block = int(count ** (1 / 3))
        self._blocks = -(-count // block)
        starts = np.random.default_rng(0).integers(0, count, (RESAMPLES, self._blocks, 1))
        chosen = ((starts + np.arange(block)) % count).reshape(RESAMPLES, -1)[:, :count] + (cycles - count)
        self.scatter = float(np.std(statistic(chosen))) if count > 1 else math.inf
        low, high = np.quantile(statistic(np.arange(cycles)[-count:, None]), (0.25, 0.75))
        self.drift = max(drift, DRIFT_PER_SPREAD * float(high - low) / QUARTILES)

    def deviation(self, confidence: float) -> float:
        """Standard deviation of scatter and drift together, the scatter's so large that the normal distribution's
        quantile gives what Student's would."""
        if self._blocks < 2:
            return math.inf
        tail = (1.0 + confidence) / 2.0
        return math.hypot(
            self.scatter * float(stdtrit(self._blocks - 1, tail)) / NormalDist().inv_cdf(tail), self.drift
        )


def change_interval(log_ratio: float, before: Noise, after: Noise, confidence: float) -> list[float] | None:
    """Lower end, middle and upper end of a relative change; None where a run is too short to have one."""
    half = NormalDist().inv_cdf((1.0 + confidence) / 2.0) * math.hypot(
        before.deviation(confidence), after.deviation(confidence)
    )
    if not math.isfinite(half) or half > math.log(1e6):
        return None
    return [math.expm1(log_ratio + end) for end in (-half, 0.0, half)]
