"""Seconds that can be compared: at one pace of the machine, and of steps that train on one share of their completions.

The pace is that of the user's configuration, measured again now and then. The share: `skip_dead` leaves groups without
a spread of rewards out of the training pass, so a step's seconds follow the share of its completions that are left,
which is chance in the few steps of a trial, and another one as training goes on. The seconds of the training pass are a
line over it, by least squares without negative parts (`scipy.optimize.nnls`), through what was measured and through
nothing for no rows.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.probe import ProbeRecord, StageRow
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.study import distance, name_of

TRAINED, APART = ("policy_logprob", "backward"), "old_policy"
"""Stages that rows without a gradient are left out of, but for that part of the first."""


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


class _Step(NamedTuple):
    share: float
    seconds: float  # of the training pass


class LivingRows:
    """The measured steps of each combination with `skip_dead`, and the line through them."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[Knobs, list[_Step]]] = {}

    def learn(self, knobs: Knobs, outcome: TrialOutcome) -> None:
        """Take the measured steps of a trial into account."""
        steps = _steps_of(outcome.record) if outcome.record is not None else []
        if steps:
            self._steps.setdefault(name_of(knobs), (knobs, []))[1].extend(steps)

    def seen(self, knobs: Knobs) -> float | None:
        """Mean share that was trained on; None without `skip_dead`."""
        _, steps = self._steps.get(name_of(knobs), (knobs, []))
        return statistics.fmean(step.share for step in steps) if steps else None

    def slope_s(self, knobs: Knobs) -> float | None:
        """Seconds by which a step that trains on all its completions is longer than one that trains on none. Where no
        step trained on any, those of the nearest combination; None where no combination's did, or without `skip_dead`.
        """
        if name_of(knobs) not in self._steps:
            return None
        known = [(distance(knobs, other), steps) for other, steps in self._steps.values() if _trains(steps)]
        return _slope(min(known, key=lambda pair: pair[0])[1]) if known else None

    def at(self, share: float, knobs: Knobs, outcome: TrialOutcome) -> TrialOutcome:
        """A trial's outcome with the seconds of its steps, and of their stages, as if each had trained on `share` of
        its completions; as it is where nothing tells how long that takes."""
        slope_s, record = self.slope_s(knobs), outcome.record
        steps = _steps_of(record) if record is not None else []
        if slope_s is None or record is None or not steps:
            return outcome
        factors = [max(0.0, 1.0 + slope_s * (share - one.share) / one.seconds) if one.seconds else 1.0 for one in steps]
        timings = record.timings
        step_s = [
            s + one.seconds * (factor - 1.0) for s, one, factor in zip(timings.step_s, steps, factors, strict=True)
        ]
        stages = [_longer(row, factors) if row.name in TRAINED else row for row in timings.stages]
        timings = timings.model_copy(update={"stages": stages, "step_s": step_s})
        record = record.model_copy(update={"timings": timings, "living_shares": [share] * len(steps)})
        return outcome.model_copy(update={"record": record, "step_s": step_s})


def _steps_of(record: ProbeRecord) -> list[_Step]:
    """The measured steps; empty without `skip_dead`."""
    rows = [_in_training(row) for row in record.timings.stages if row.name in TRAINED and row.per_step_s]
    if not rows or len(record.living_shares) != len(record.timings.step_s):
        return []
    return [_Step(share, math.fsum(each)) for share, *each in zip(record.living_shares, *rows, strict=True)]


def _in_training(row: StageRow) -> list[float]:
    """Seconds of each step that a stage spent in the training pass."""
    apart = row.parts.get(APART, [0.0] * len(row.per_step_s))
    return [seconds - before for seconds, before in zip(row.per_step_s, apart, strict=True)]


def _longer(row: StageRow, factors: Sequence[float]) -> StageRow:
    """A stage whose seconds in the training pass are so many times as long in each step."""

    def times(values: Sequence[float]) -> list[float]:
        return [value * factor for value, factor in zip(values, factors, strict=True)]

    parts = {name: values if name == APART else times(values) for name, values in row.parts.items()}
    each = zip(row.per_step_s, _in_training(row), factors, strict=True)
    return row.model_copy(update={"per_step_s": [s + trained * (f - 1.0) for s, trained, f in each], "parts": parts})


def _trains(steps: Sequence[_Step]) -> bool:
    return any(step.share > 0.0 for step in steps)


def _slope(steps: Sequence[_Step]) -> float:
    """Slope of the line through the steps and through nothing for no rows; none of its parts is negative."""
    at, seconds = np.array([(1.0, step.share) for step in steps]), np.array([step.seconds for step in steps])
    (_, slope), _ = nnls(np.vstack([at, (1.0, 0.0)]), np.append(seconds, 0.0))
    return float(slope)
