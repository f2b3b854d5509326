"""Seconds that can be compared: without evaluations, at one pace of the machine, of steps that train on one share of
their completions.

The pace is that of the user's configuration, measured again now and then. The share: `skip_dead` leaves groups without
a spread of rewards out of the training pass, so a step's seconds follow the share of its completions that are left,
which is chance in the few steps of a trial, and another one as training goes on. The seconds of the training pass are a
line over it, by least squares without negative parts (`scipy.optimize.nnls`), through what was measured and through
nothing for no rows.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.probe import TRAINED, ProbeRecord, StageRow
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.study import distance, name_of

MOST = 0.9
"""Part of a step that its training pass may take where both are not of the same minutes."""
OLD_POLICY = "old_policy"
"""Part of a stage of the training pass that computes all rows."""


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


class _Line(NamedTuple):
    """Seconds of the training pass over the share."""

    none_s: float
    slope_s: float

    def pace_of(self, steps: Sequence[_Step]) -> float:
        """Seconds of steps that trained over the line's: on another part of the machine, or at another time."""
        trained = [step for step in steps if step.share > 0.0]
        expected_s = math.fsum(self.none_s + self.slope_s * step.share for step in trained)
        return math.fsum(step.seconds for step in trained) / expected_s if expected_s > 0.0 else 1.0


class LivingRows:
    """The measured steps of each combination with `skip_dead`, and the line through them."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[Knobs, list[_Step]]] = {}

    def learn(self, knobs: Knobs, outcome: TrialOutcome) -> None:
        """Take the measured steps of a trial into account."""
        steps = _steps_of(outcome.record) if outcome.record is not None else []
        if steps:
            self._steps.setdefault(name_of(knobs), (knobs, []))[1].extend(steps)

    def slope_s(self, knobs: Knobs) -> float | None:
        """Seconds by which a step that trains on all its completions is longer than one that trains on none. Where no
        step trained on any, those of the nearest combination; None where no combination's did, or without `skip_dead`.
        """
        line = self._line(knobs)
        return None if line is None else line.slope_s

    def _line(self, knobs: Knobs) -> _Line | None:
        if name_of(knobs) not in self._steps:
            return None
        known = [(distance(knobs, other), steps) for other, steps in self._steps.values() if _trains(steps)]
        return _line_through(min(known, key=lambda pair: pair[0])[1]) if known else None

    def at(self, share: float, knobs: Knobs, outcome: TrialOutcome) -> TrialOutcome:
        """A trial's outcome with the seconds of its steps, and of their stages, as if each had trained on `share` of
        its completions, at the pace of its training pass; as it is where nothing tells how long that takes."""
        line, record = self._line(knobs), outcome.record
        steps = _steps_of(record) if record is not None else []
        if line is None or record is None or not steps or len(outcome.living_shares) != len(outcome.step_s):
            return outcome
        slope_s = line.slope_s * line.pace_of(steps)
        # a step can be shorter by its training pass, a round of several by most of its time
        whole = len(steps) == len(outcome.step_s)
        least_s = [-one.seconds for one in steps] if whole else [-MOST * s for s in outcome.step_s]
        moved = zip(outcome.step_s, outcome.living_shares, least_s, strict=True)
        step_s = [s + max(least, slope_s * (share - was)) for s, was, least in moved]
        more_s, whole_s = [slope_s * (share - one.share) for one in steps], math.fsum(one.seconds for one in steps)
        stages = [
            _longer(row, [math.fsum(_in_training(row)) / whole_s * more for more in more_s])
            if row.name in TRAINED and whole_s
            else row
            for row in record.timings.stages
        ]
        even = timed_otherwise(outcome, step_s, stages)
        assert even.record is not None
        shares = {"living_shares": [share] * len(steps)}
        return even.model_copy(
            update={"living_shares": [share] * len(step_s), "record": even.record.model_copy(update=shares)}
        )


def without_evaluations(outcome: TrialOutcome) -> TrialOutcome:
    """An outcome without evaluations: a run has them at intervals of its own, which measured steps hit or miss."""
    record = outcome.record
    row = next((row for row in record.timings.stages if "evaluate" in row.parts), None) if record is not None else None
    if record is None or row is None:
        return outcome
    parts = dict(row.parts)
    spent = parts.pop("evaluate")
    rest, step_s = (
        [seconds - s for seconds, s in zip(values, spent, strict=True)]
        for values in (row.per_step_s, record.timings.step_s)
    )
    alone = row.model_copy(update={"per_step_s": rest, "parts": parts})
    return timed_otherwise(outcome, step_s, [alone if one is row else one for one in record.timings.stages])


def faster(outcome: TrialOutcome, factor: float) -> TrialOutcome:
    """An outcome with the seconds of its steps, and of their stages, over a factor."""
    if outcome.record is None or factor == 1.0:
        return outcome

    def each(values: Sequence[float]) -> list[float]:
        return [value / factor for value in values]

    stages = [
        row.model_copy(
            update={"per_step_s": each(row.per_step_s), "parts": {name: each(s) for name, s in row.parts.items()}}
        )
        for row in outcome.record.timings.stages
    ]
    return timed_otherwise(outcome, each(outcome.step_s), stages)


def timed_otherwise(outcome: TrialOutcome, step_s: list[float], stages: list[StageRow]) -> TrialOutcome:
    """An outcome with other seconds; the record's steps keep theirs where a race has one of several steps."""
    assert outcome.record is not None
    timings = outcome.record.timings.model_copy(update={"stages": stages})
    if len(step_s) == len(timings.steps):
        timings = timings.model_copy(update={"step_s": step_s})
    record = outcome.record.model_copy(update={"timings": timings})
    return outcome.model_copy(update={"step_s": step_s, "record": record})


def _steps_of(record: ProbeRecord) -> list[_Step]:
    """The measured steps; empty without `skip_dead`, and where several ranks wait for the one with most rows left."""
    rows = [_in_training(row) for row in record.timings.stages if row.name in TRAINED and row.per_step_s]
    if not rows or not record.living_shares or record.trainer.world_size > 1:
        return []
    return [_Step(share, math.fsum(each)) for share, *each in zip(record.living_shares, *rows, strict=True)]


def _in_training(row: StageRow) -> list[float]:
    """Seconds of each step that a stage spent in the training pass."""
    apart = row.parts.get(OLD_POLICY, [0.0] * len(row.per_step_s))
    return [seconds - before for seconds, before in zip(row.per_step_s, apart, strict=True)]


def _longer(row: StageRow, more_s: Sequence[float]) -> StageRow:
    """A stage that is so much longer in each step, all of it in the training pass."""

    def longer(values: Sequence[float]) -> list[float]:
        return [max(0.0, value + more) for value, more in zip(values, more_s, strict=True)]

    parts = {name: values if name == OLD_POLICY else longer(values) for name, values in row.parts.items()}
    return row.model_copy(update={"per_step_s": longer(row.per_step_s), "parts": parts})


def _trains(steps: Sequence[_Step]) -> bool:
    return any(step.share > 0.0 for step in steps)


def _line_through(steps: Sequence[_Step]) -> _Line:
    """The line through the steps and through nothing for no rows; none of its parts is negative."""
    at, seconds = np.array([(1.0, step.share) for step in steps]), np.array([step.seconds for step in steps])
    (none_s, slope_s), _ = nnls(np.vstack([at, (1.0, 0.0)]), np.append(seconds, 0.0))
    return _Line(float(none_s), float(slope_s))
