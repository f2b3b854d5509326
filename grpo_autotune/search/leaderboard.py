"""What a search knows of each combination: measured seconds, score, memory, and whether it may be recommended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs import Kind, Knobs, kind_of, with_knobs
from grpo_autotune.predict.objective import (
    RESAMPLES,
    Interval,
    Living,
    living_of,
    run_ratio,
    step_interval,
    useful_per_step,
)
from grpo_autotune.records.probe import ProbeRecord, cycle_means
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.noninferiority import NO_TIME
from grpo_autotune.search.study import name_of

Level = Literal["exact", "tuned", "open", "fast"]
"""What may be recommended: nothing learned changes; what changes is proven or accepted; that, or may still be proven;
anything."""
Proof = Literal["exact", "proven", "accepted", "unproven"]
GROUP = "grpo.num_generations"
JUDGED_BY_REWARDS = ("data.image_size",)
"""Learning knobs that show in the rewards before any training; others show only in what is learnt."""


@dataclass
class Entry:
    """One measured combination. Of the race: `raced` is its score over the user's, `raced_s` its seconds a step,
    `raced_own_s` those of the user's configuration."""

    knobs: Knobs
    config: RunConfig
    number: int
    steps_s: list[float]
    cycle: int
    step: Interval
    predicted_s: float | None
    peak_bytes: int | None
    raced: Interval | None = None
    raced_s: Interval | None = None
    raced_own_s: Interval | None = None
    worst_case: Literal["passed", "not run"] = "not run"
    fails: str | None = None

    @property
    def cycles_s(self) -> list[float]:
        """Seconds a step, one figure a cycle of generating and reusing."""
        return cycle_means(self.steps_s, self.cycle)

    def saw_peak(self, peak_bytes: int | None) -> None:
        """Take the memory of another measurement of it into account."""
        self.peak_bytes = max((peak for peak in (self.peak_bytes, peak_bytes) if peak is not None), default=None)


@dataclass
class Book:
    """The entries of one search.

    Attributes:
        config: The user's configuration.
        own: The user's values of the space's knobs.
        record: The probe's record.
        living: How the share of living groups follows the group size; null where no spread of rewards was seen.
        guards: (knob, value's name) -> what was found out.
    """

    config: RunConfig
    own: Knobs
    record: ProbeRecord
    living: Living | None = field(init=False)
    entries: dict[str, Entry] = field(default_factory=dict)
    guards: dict[tuple[str, str], Guard] = field(default_factory=dict)
    _configs: dict[str, RunConfig] = field(default_factory=dict)
    _kinds: dict[str, Kind] = field(default_factory=dict)
    _useful: dict[int, tuple[RunConfig, float]] = field(default_factory=dict)
    _ratios: dict[tuple[str, int, int], Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.living = living_of(self.record)

    @property
    def confidence(self) -> float:
        return self.config.search.confidence

    @property
    def baseline(self) -> Entry:
        """The user's configuration."""
        return self.entries[name_of(self.own)]

    def config_of(self, knobs: Knobs) -> RunConfig:
        """The whole configuration of a combination."""
        name = name_of(knobs)
        if name not in self._configs:
            self._configs[name] = with_knobs(self.config, knobs)
        return self._configs[name]

    def changed(self, knobs: Knobs) -> Knobs:
        """The knobs that differ from the user's."""
        return {key: value for key, value in knobs.items() if name_of({key: value}) != name_of({key: self.own[key]})}

    def kind(self, key: str) -> Kind:
        """Whether a knob changes what is learned."""
        if key not in self._kinds:
            self._kinds[key] = kind_of(self.config, key, self.record)
        return self._kinds[key]

    def learning(self, knobs: Knobs) -> list[str]:
        """The changed knobs that change what is learned."""
        return [key for key in self.changed(knobs) if self.kind(key) == "learning"]

    def proof(self, key: str, value: Any) -> Proof:
        """Why a changed knob may be recommended."""
        if self.kind(key) == "exact":
            return "exact"
        if key in self.config.search.accept:
            return "accepted"
        guard = self.guards.get((key, name_of({key: value})))
        return "proven" if guard is not None and guard.proven else "unproven"

    def note(self, guard: Guard) -> None:
        """Remember what was found out about a value."""
        self.guards[guard.key, name_of({guard.key: guard.after})] = guard

    def had_no_time(self, key: str) -> bool:
        """Whether a value of this knob was left without proof because the time did not hold it."""
        return any(guard.key == key and guard.why == NO_TIME for guard in self.guards.values())

    def guard(self, key: str, value: Any) -> Guard | None:
        """What was found out about a value."""
        return self.guards.get((key, name_of({key: value})))

    def add(self, knobs: Knobs, outcome: TrialOutcome, predicted_s: float | None) -> Entry:
        """Enter what a trial measured; a combination measured again keeps all its steps."""
        name, cycle = name_of(knobs), outcome.record.timings.cycle if outcome.record else 1
        there = self.entries.get(name)
        steps_s = [*(there.steps_s if there else []), *outcome.step_s]
        peaks = [peak for peak in (there.peak_bytes if there else None, outcome.peak_bytes) if peak is not None]
        entry = Entry(
            knobs=knobs,
            config=self.config_of(knobs),
            number=there.number if there else outcome.number,
            steps_s=steps_s,
            cycle=cycle,
            step=step_interval(steps_s, cycle, self.confidence),
            predicted_s=there.predicted_s if there else predicted_s,
            peak_bytes=max(peaks, default=None),
        )
        self.entries[name] = entry
        return entry

    def score(self, config: RunConfig, step_s: float) -> float:
        """Useful completions a second."""
        if id(config) not in self._useful:
            truncated = self.record.tokens.truncated_share if self.record.tokens else 0.0
            self._useful[id(config)] = config, useful_per_step(config, self.living, truncated)
        return self._useful[id(config)][1] / step_s

    def worth(self, config: RunConfig) -> float:
        """Useful completions of a step over those of a step of the user's configuration."""
        own = self.score(self.config, 1.0)
        return self.score(config, 1.0) / own if own > 0.0 else 1.0

    def speedup(self, entry: Entry) -> Interval:
        """Score over the user's: from the race where there was one, else from both trials' medians."""
        if entry.raced is not None:
            return entry.raced
        if entry is self.baseline:
            return Interval(1.0, 1.0, 1.0, entry.step.n)
        alike = min(len(self.baseline.cycles_s), len(entry.cycles_s))  # of the same prompts and lengths
        before, after = self.baseline.cycles_s[:alike], entry.cycles_s[:alike]
        known = (name_of(entry.knobs), len(before), len(after))
        if known not in self._ratios:
            self._ratios[known] = median_ratio(before, after, self.confidence)
        return scaled(self._ratios[known], self.worth(entry.config))

    def longer(self, config: RunConfig, step_ratio: float) -> bool:
        """Whether the configured run would take longer, and that is not allowed."""
        return not self.config.search.allow_longer_run and run_ratio(config, self.config, step_ratio) > 1.0

    def may(self, entry: Entry, level: Level) -> bool:
        """Whether an entry may be recommended at a level."""
        if entry is self.baseline:
            return True
        if entry.fails is not None or self.longer(entry.config, self._step_ratio(entry)):
            return False
        return self.allows(entry.knobs, level)

    def allows(self, knobs: Knobs, level: Level) -> bool:
        """Whether what a combination changes is shown, or may still be, as a level asks."""
        allowed = ("exact",) if level == "exact" else ("exact", "proven", "accepted")
        return level == "fast" or all(
            self.proof(key, value) in allowed or (level == "open" and self._undecided(key, value))
            for key, value in self.changed(knobs).items()
        )

    def ranking(self, level: Level) -> list[Entry]:
        """Entries that may be recommended, best first."""
        found = [entry for entry in self.entries.values() if self.may(entry, level)]
        return sorted(found, key=lambda entry: -self.speedup(entry).value)

    def best(self, level: Level) -> Entry:
        """The best that beats the user's configuration beyond noise; else that one. What was raced counts before what
        was not, unless that stood its worst case and is faster whatever the noise in both."""
        better = [entry for entry in self.ranking(level) if entry is self.baseline or self.speedup(entry).low > 1.0]
        raced = next((entry for entry in better if entry.raced is not None), None)
        if raced is None:
            return better[0]
        surely = self.speedup(raced).high
        faster = (e for e in better if e.worst_case == "passed" and self.speedup(e).low > surely)
        return next(faster, raced)

    def _undecided(self, key: str, value: Any) -> bool:
        """Whether a search can prove a learning knob's value, and has not looked yet."""
        return self.guard(key, value) is None and (key == GROUP or key in JUDGED_BY_REWARDS)

    def _step_ratio(self, entry: Entry) -> float:
        if entry.raced is not None:
            return self.worth(entry.config) / entry.raced.value
        return entry.step.value / self.baseline.step.value


def median_ratio(before_s: Iterable[float], after_s: Iterable[float], confidence: float) -> Interval:
    """Median of `before_s` over that of `after_s`, with the bootstrap interval of two independent samples."""
    before, after = np.asarray(list(before_s)), np.asarray(list(after_s))
    value = float(np.median(before) / np.median(after))
    fewer = min(before.size, after.size)
    if fewer < 2:
        return Interval(value, 0.0, float("inf"), fewer)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(np.median(x, axis=axis) / np.median(y, axis=axis))

    ends = bootstrap(
        (before, after),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(ends.low), float(ends.high), fewer)


def scaled(interval: Interval, factor: float) -> Interval:
    """An interval of something that is `factor` times as large."""
    return Interval(interval.value * factor, interval.low * factor, interval.high * factor, interval.n)
