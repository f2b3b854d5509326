"""Pace of the machine during a search: the user's configuration, measured again now and then."""

import itertools
import math

import numpy as np

from grpo_autotune.predict.objective import Interval


class Pace:
    """Seconds of the same steps over what they took in the first trial, between two measurements by a line."""

    def __init__(self) -> None:
        # trial, logarithm of the measured ratio, and the same where the steps' own scatter does not explain it, else 0
        self.looks: list[tuple[int, float, float]] = []

    def learn(self, number: int, ratio: Interval) -> None:
        """Take one more measurement of the user's configuration into account, over the first."""
        log = math.log(ratio.value)
        self.looks.append((number, log, 0.0 if ratio.low <= 1.0 <= ratio.high else log))

    def at(self, number: float) -> float:
        """The pace during a trial; 1 as long as nothing was measured twice."""
        numbers, _, logs = zip(*self.looks, strict=True) if self.looks else ((0,), (0.0,), (0.0,))
        return math.exp(float(np.interp(number, numbers, logs)))

    @property
    def doubt(self) -> float:
        """Factor by which the pace between two looks may be off: half of the largest change from one to the next."""
        steps = (abs(after[1] - before[1]) for before, after in itertools.pairwise(self.looks))
        return math.exp(max(steps, default=0.0) / 2.0)
