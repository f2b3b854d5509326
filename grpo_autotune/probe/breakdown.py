"""The accounting of a step: every stage's seconds, so scaled that the stages sum to the step's median."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from grpo_autotune.errors import NothingSucceeded
from grpo_autotune.records.probe import StageTimings, cycle_means

SLOW = 1.5
"""Times the median: a step that takes longer is counted as slow."""


class Limit(NamedTuple):
    """Closeness of a stage to this machine's measured ceiling."""

    share: float  # time the ceiling would allow over time taken, 0 to 1
    by: Literal["matrix", "memory"]  # the ceiling that binds: matrix rate or memory bandwidth


@dataclass(frozen=True)
class Breakdown:
    """Seconds of an optimizer step, and by stage; where steps that generate take turns with steps that do not, a step
    is the mean of a whole cycle."""

    step_s: float  # median
    step_spread_s: float  # half the interquartile range
    shares: dict[str, float]  # parts of all measured seconds; they sum to 1
    self_s: dict[str, float]  # `share * step_s`; they sum to `step_s`
    mean_s: dict[str, float]  # plain mean over the measured steps
    spread_s: dict[str, float]  # half the interquartile range over steps
    parts_s: dict[tuple[str, str], float]  # (stage, part) to seconds, scaled as `self_s` is
    slowest: float = 1.0  # seconds of the slowest step over the median
    slow_steps: int = 0  # steps that took more than `SLOW` times the median

    def seconds(self, *stages: str) -> float:
        return math.fsum(self.self_s.get(stage, 0.0) for stage in stages)


def half_quartile_range(values: Sequence[float]) -> float:
    """Half of the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2.0


def break_down(timings: StageTimings) -> Breakdown:
    """Account for the measured steps; NothingSucceeded where there is none, or none took any time."""
    cycles = cycle_means(timings.step_s, timings.cycle)
    per_cycle = {row.name: cycle_means(row.per_step_s, timings.cycle) for row in timings.stages}
    total = math.fsum(math.fsum(values) for values in per_cycle.values())
    if not cycles or total <= 0.0:
        fix = "Let the trainer run at least two optimizer steps (`--steps 3`)."
        raise NothingSucceeded("no optimizer step was measured", fix=fix)
    step_s = statistics.median(cycles)
    shares = {name: math.fsum(values) / total for name, values in per_cycle.items()}
    parts = {
        (row.name, part): math.fsum(cycle_means(values, timings.cycle)) / total * step_s
        for row in timings.stages
        for part, values in row.parts.items()
    }
    return Breakdown(
        step_s=step_s,
        step_spread_s=half_quartile_range(cycles),
        shares=shares,
        self_s={name: share * step_s for name, share in shares.items()},
        mean_s={name: statistics.fmean(values) if values else 0.0 for name, values in per_cycle.items()},
        spread_s={name: half_quartile_range(values) for name, values in per_cycle.items()},
        parts_s=parts,
        slowest=max(cycles) / step_s,
        slow_steps=sum(seconds > SLOW * step_s for seconds in cycles),
    )
