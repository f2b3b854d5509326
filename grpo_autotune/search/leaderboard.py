"""Leaderboard of the measured combinations: seconds per step, score, memory, and what may be recommended."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs import Kind, Knobs, kind_of, with_knobs
from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.knobs.table import REACH, WORKERS
from grpo_autotune.predict.models import stage_seconds
from grpo_autotune.predict.objective import (
    Interval,
    Living,
    groups_per_step,
    living_of,
    median_interval,
    run_ratio,
    step_interval,
    useful_per_step,
)
from grpo_autotune.records.probe import ProbeRecord, cycle_means
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.comparable import LivingRows, Pace
from grpo_autotune.search.study import differing, distance, name_of

Level = Literal["exact", "tuned", "open", "fast"]
"""Combinations that may be recommended: those that change nothing learned; those whose changes are proven or accepted;
these, or may still be proven; all."""
Evidence = Literal["exact", "proven", "accepted", "unproven"]
JUDGED_BY_REWARDS = ("data.image_size",)
"""Learning knobs that show in the rewards before any training; others show only in the trained policy."""
TIE = 0.03
"""Scores that differ by less are equal, unless measurements side by side tell them apart."""
EVALUATING = ("generation", "prompt", "reward", "reference_logprob")
"""Stages of a step that an evaluation goes through: its seconds are taken to follow theirs."""


@dataclass(frozen=True)
class RaceResult:
    """Interleaved race of a combination against the user's configuration."""

    speedup: Interval  # score over the user's
    step: Interval  # seconds per step; `baseline_step`: the user's
    baseline_step: Interval


@dataclass(frozen=True)
class Entry:
    """One measured combination."""

    knobs: Knobs
    config: RunConfig
    number: int
    steps_s: list[float]  # seconds of each measured step
    cycle: int  # steps of a cycle of generating and reusing
    step: Interval  # seconds per step; `stages_s` by stage
    predicted_s: float | None
    peak_bytes: int | None
    stages_s: Mapping[str, float] = field(default_factory=dict)
    aside_s: float = 0.0  # seconds per step that the run's evaluations and checkpoints take
    asides_s: list[float] = field(default_factory=list)  # the same beside each measured step, by its own stages
    living_share: float | None = None  # that its steps, or the race's, are of: see `comparable`
    race: RaceResult | None = None
    worst_case: Literal["passed", "not run"] = "not run"
    fails: str | None = None  # reason why it may not win
    place: str | None = None  # part of the machine that measured it, beside others; None where it ran alone

    @property
    def runs_s(self) -> list[float]:
        """Seconds per step of each cycle, with evaluations and checkpoints."""
        return cycle_means([step + aside for step, aside in zip(self.steps_s, self.asides_s, strict=True)], self.cycle)


@dataclass
class Leaderboard:
    """The entries of one search, and the guards on learning knobs."""

    config: RunConfig  # the user's
    baseline_knobs: Knobs  # the user's values of the space's knobs
    record: ProbeRecord
    evaluation_s: float = 0.0  # seconds per step that evaluations take as the user has them
    saving_s: float = 0.0  # seconds per step that checkpoints take
    rows: LivingRows = field(default_factory=LivingRows)
    pace: Pace = field(default_factory=Pace)
    paces: dict[str, Pace] = field(default_factory=dict)  # of each worker's place, over the machine's first
    living: Living | None = field(init=False)  # None where no spread of rewards was seen
    entries: dict[str, Entry] = field(default_factory=dict)
    guards: dict[tuple[str, str], Guard] = field(default_factory=dict)  # (knob, value's name) -> judgement
    _configs: dict[str, RunConfig] = field(default_factory=dict)
    _kinds: dict[str, Kind] = field(default_factory=dict)
    _useful: dict[int, tuple[RunConfig, float]] = field(default_factory=dict)
    _ratios: dict[tuple[float, ...], Interval] = field(default_factory=dict)
    _pairs: dict[tuple[str, str], Interval] = field(default_factory=dict)  # of races

    def __post_init__(self) -> None:
        self.living = living_of(self.record)

    @property
    def confidence(self) -> float:
        return self.config.search.confidence

    @property
    def has_baseline(self) -> bool:
        return name_of(self.baseline_knobs) in self.entries

    @property
    def baseline(self) -> Entry:
        return self.entries[name_of(self.baseline_knobs)]

    def entry(self, knobs: Knobs) -> Entry | None:
        return self.entries.get(name_of(knobs))

    def config_of(self, knobs: Knobs) -> RunConfig:
        name = name_of(knobs)
        if name not in self._configs:
            self._configs[name] = with_knobs(self.config, knobs)
        return self._configs[name]

    # What a combination changes

    def changed(self, knobs: Knobs) -> Knobs:
        """The knobs that differ from the user's."""
        return {key: knobs[key] for key in differing(knobs, self.baseline_knobs)}

    def without(self, knobs: Knobs, *keys: str) -> Knobs:
        """A combination with some knobs as the user has them."""
        return {**knobs, **{key: self.baseline_knobs[key] for key in keys}}

    def kind(self, key: str) -> Kind:
        """`learning` for a knob that changes what is learned, else `exact`."""
        if key not in self._kinds:
            self._kinds[key] = kind_of(self.config, key, self.record)
        return self._kinds[key]

    def learning(self, knobs: Knobs) -> list[str]:
        """The changed knobs that change what is learned."""
        return [key for key in self.changed(knobs) if self.kind(key) == "learning"]

    def evidence(self, key: str, value: Any) -> Evidence:
        """Evidence that a changed knob leaves learning as it is."""
        if self.kind(key) == "exact":
            return "exact"
        if key in self.config.search.accept:
            return "accepted"
        guard = self.guard(key, value)
        return "proven" if guard is not None and guard.proven else "unproven"

    def guard(self, key: str, value: Any) -> Guard | None:
        return self.guards.get((key, name_of({key: value})))

    def note(self, guard: Guard) -> None:
        self.guards[guard.key, name_of({guard.key: guard.after})] = guard

    def is_group_unknown(self, knobs: Knobs) -> bool:
        """True where the group size changes and no spread of rewards tells what another one is worth."""
        return self.living is None and GROUP in self.changed(knobs)

    def loses_groups(self, knobs: Knobs) -> bool:
        """True where a step would have fewer living groups than the user's, which nothing measured here outweighs."""
        if self.living is None or GROUP not in self.changed(knobs) or GROUP in self.config.search.accept:
            return False
        return self.living_groups(self.config_of(knobs)) < (1.0 - 1e-9) * self.living_groups(self.config)

    def living_groups(self, config: RunConfig) -> float:
        """Expected groups per step whose rewards differ."""
        share = 1.0 if self.living is None else self.living.share(config.batch.num_generations)
        return groups_per_step(config) * share

    # Measurements

    def see_place(self, place: str, outcome: TrialOutcome) -> None:
        """Note how long the user's configuration took on a worker's place, beside the other workers."""
        self.paces.setdefault(place, Pace()).learn(outcome.number, self._over_first(outcome))

    def _over_first(self, outcome: TrialOutcome) -> Interval:
        """Seconds of the user's configuration over those of its first trial."""
        cycle = outcome.record.timings.cycle if outcome.record else 1
        both = (cycle_means(outcome.step_s, cycle), cycle_means(self.baseline.steps_s, self.baseline.cycle))
        return median_interval([after / first for after, first in zip(*both, strict=False)], self.confidence)

    def add(self, knobs: Knobs, outcome: TrialOutcome, predicted_s: float | None, place: str | None = None) -> Entry:
        """Enter a trial's measurement. A combination measured again keeps all its steps, or those that it made alone;
        the user's keeps its first ones, and shows the pace of the machine."""
        before, cycle = self.entry(knobs), outcome.record.timings.cycle if outcome.record else 1
        is_users = name_of(knobs) == name_of(self.baseline_knobs)
        if before is not None and is_users:
            if place is None:
                self.pace.learn(outcome.number, self._over_first(outcome))
            return before
        if before is not None and before.place is not None:
            before = None
        steps_s = [*(before.steps_s if before else []), *outcome.step_s]
        stages_s = stage_seconds(outcome.record.timings) if outcome.record else {}
        asides_s = [*(before.asides_s if before else []), *self._asides_s(outcome, stages_s)]
        entry = Entry(
            knobs=knobs,
            config=self.config_of(knobs),
            number=before.number if before else outcome.number,
            steps_s=steps_s,
            cycle=cycle,
            step=step_interval(steps_s, cycle, self.confidence),
            predicted_s=before.predicted_s if before else predicted_s,
            peak_bytes=_larger(before.peak_bytes if before else None, outcome.peak_bytes),
            stages_s=stages_s,
            aside_s=self.apart_s(stages_s),
            asides_s=asides_s,
            living_share=outcome.record.living_share if outcome.record else None,
            place=place,
        )
        self.entries[name_of(knobs)] = entry
        if is_users:
            self.pace.learn(entry.number, Interval(1.0, 1.0, 1.0))
        return entry

    def add_worst_case(self, entry: Entry, outcome: TrialOutcome) -> Entry:
        """Enter the outcome of a worst-case step; one that ran out of time says nothing."""
        if outcome.status == "timeout":
            return entry
        if outcome.status == "ok":
            return self.add_peak(entry, outcome.peak_bytes, worst_case="passed")
        why = f"the worst-case step ended with {outcome.status}: {outcome.why or 'no reason given'}"
        return self.update(entry, fails=why)

    def add_peak(self, entry: Entry, peak_bytes: int | None, **changes: Any) -> Entry:
        return self.update(entry, peak_bytes=_larger(entry.peak_bytes, peak_bytes), **changes)

    def update(self, entry: Entry, **changes: Any) -> Entry:
        name = name_of(entry.knobs)
        self.entries[name] = replace(self.entries[name], **changes)
        return self.entries[name]

    # Scores

    def useful(self, config: RunConfig) -> float:
        """Useful completions per step."""
        if id(config) not in self._useful:
            truncated = self.record.tokens.truncated_share if self.record.tokens else 0.0
            self._useful[id(config)] = config, useful_per_step(config, self.living, truncated)
        return self._useful[id(config)][1]

    def score(self, config: RunConfig, step_s: float) -> float:
        """Useful completions per second."""
        return self.useful(config) / step_s

    def apart_s(self, stages_s: Mapping[str, float]) -> float:
        """Seconds per step that evaluations and checkpoints take where a step's stages take so long."""
        probed = stage_seconds(self.record.timings)
        before, after = (math.fsum(side.get(name, 0.0) for name in EVALUATING) for side in (probed, stages_s))
        return self.saving_s + self.evaluation_s * (after / before if before > 0.0 and after > 0.0 else 1.0)

    def _asides_s(self, outcome: TrialOutcome, stages_s: Mapping[str, float]) -> list[float]:
        rows = outcome.record.timings.stages if outcome.record else []
        columns = zip(*(row.per_step_s for row in rows if row.name in EVALUATING), strict=True)
        each = [self.apart_s({EVALUATING[0]: math.fsum(column)}) for column in columns]
        return each if len(each) == len(outcome.step_s) else [self.apart_s(stages_s)] * len(outcome.step_s)

    def seconds(self, entry: Entry) -> float:
        """Seconds per step of a run, evaluations and checkpoints included, at the machine's first pace."""
        return entry.step.value / self._pace(entry) + entry.aside_s

    def _pace(self, entry: Entry) -> float:
        """The machine's pace when an entry was measured; that of a worker's place is over the first pace already."""
        return self.pace.at(entry.number) if entry.place is None else 1.0

    def note_pair(self, slower: Entry, faster: Entry, ratio: Interval) -> None:
        """Note the score of one entry over that of another, measured side by side."""
        names = name_of(slower.knobs), name_of(faster.knobs)
        self._pairs |= {names: ratio, names[::-1]: Interval(1.0, 1.0, 1.0, ratio.n).over(ratio)}

    def pair(self, slower: Entry, faster: Entry) -> Interval | None:
        """Score of one entry over that of another where they were measured side by side."""
        return self._pairs.get((name_of(slower.knobs), name_of(faster.knobs)))

    def worth(self, config: RunConfig) -> float:
        """Useful completions per step over those of the user's configuration."""
        baseline = self.useful(self.config)
        return self.useful(config) / baseline if baseline > 0.0 else 1.0

    def ratio(self, slower: Entry, faster: Entry) -> Interval:
        """Score of one entry over that of another, by races or by their trials: step by step, as far as both go, for
        the same prompts and lengths; the machine's pace is taken out, and its doubt added to the interval."""
        if (side_by_side := self.pair(slower, faster)) is not None:
            return side_by_side
        if slower.race is not None and faster.race is not None:
            return faster.race.speedup.over(slower.race.speedup)
        pairs = [before / after for before, after in zip(slower.runs_s, faster.runs_s, strict=False)]
        if (seen := tuple(pairs)) not in self._ratios:
            self._ratios[seen] = median_interval(pairs, self.confidence)
        value, low, high, n = self._ratios[seen]
        doubt = self.pace.doubt if n > 1 else math.inf
        factor = self.worth(faster.config) / self.worth(slower.config)
        factor *= self._pace(faster) / self._pace(slower)
        return self.bounded(Interval(value, low / doubt, high * doubt, n).times(factor), slower, faster)

    def bounded(self, ratio: Interval, slower: Entry, faster: Entry) -> Interval:
        """A ratio of two entries within Amdahl's bounds; where they are next to nothing, noise is all there is. As far
        as the whole interval is beyond them it is noise, which there may be on this side of them, too."""
        keys = differing(faster.knobs, slower.knobs)
        most, least = self.most(keys, slower, faster), 1.0 / self.most(keys, faster, slower)
        value, low, high = (min(max(number, least), most) for number in ratio[:3])
        surely, at_best = (end if abs(end - 1.0) > TIE else 1.0 for end in (most, least))
        noise = max(ratio.low / most, least / ratio.high)
        if noise > 1.0:
            value = max(1.0, value / noise) if most < ratio.low else min(1.0, value * noise)
            surely, at_best = min(surely, low / noise**2), max(at_best, high * noise**2)
        return Interval(value, min(low, surely), max(high, at_best), ratio.n)

    def most(self, keys: Sequence[str], slower: Entry, faster: Entry) -> float:
        """Amdahl's bound on what some knobs' values in one entry bring over those in another: the stages that they
        reach took as long there as was measured, and could take nothing here; infinite where they reach all."""
        if not keys or not REACH.keys() >= set(keys) or not slower.stages_s or not faster.stages_s:
            return math.inf
        if any(key == WORKERS and faster.knobs[key] < slower.knobs[key] for key in keys):  # frees cores for the rest
            return math.inf
        reached = {stage for key in keys for stage in REACH[key]}
        rest = math.fsum(s for name, s in faster.stages_s.items() if name not in reached)
        return 1.0 + math.fsum(slower.stages_s.get(name, 0.0) for name in reached) / max(rest, 1e-9)

    def speedup(self, entry: Entry) -> Interval:
        """Score over the user's: from the race where there was one, else from both trials' medians."""
        if entry.race is not None:
            return entry.race.speedup
        if entry is self.baseline:
            return Interval(1.0, 1.0, 1.0, entry.step.n)
        return self.ratio(self.baseline, entry)

    # Recommendations

    def is_too_long(self, config: RunConfig, step_ratio: float) -> bool:
        """True where the configured run would take longer, and that is not allowed."""
        return not self.config.search.allow_longer_run and run_ratio(config, self.config, step_ratio) > 1.0

    def may_win(self, entry: Entry, level: Level) -> bool:
        if entry is self.baseline:
            return True
        if entry.fails is not None or self.is_too_long(entry.config, self._step_ratio(entry)):
            return False
        return self.allows(entry.knobs, level)

    def allows(self, knobs: Knobs, level: Level) -> bool:
        allowed = ("exact",) if level == "exact" else ("exact", "proven", "accepted")
        return level == "fast" or (
            not self.loses_groups(knobs)
            and all(
                self.evidence(key, value) in allowed
                or (level == "open" and self.guard(key, value) is None and key in (GROUP, *JUDGED_BY_REWARDS))
                for key, value in self.changed(knobs).items()
            )
        )

    def ranking(self, level: Level) -> list[Entry]:
        """Entries that may be recommended, best first."""
        return sorted(
            (e for e in self.entries.values() if self.may_win(e, level)), key=lambda e: -self.speedup(e).value
        )

    def best(self, level: Level) -> Entry:
        """The best that beats the user's configuration beyond noise; else that one. Of raced ones the preferred counts
        before one that was not, unless that passed its worst case and is faster whatever the noise in both."""
        better = [entry for entry in self.ranking(level) if entry is self.baseline or self.speedup(entry).low > 1.0]
        if not (raced := [entry for entry in better if entry.race is not None]):
            return next((entry for entry in better if entry.worst_case == "passed"), better[0])
        unbeaten = [e for e in raced if not any(self.beats(other, e) for other in raced)] or raced
        best = functools.reduce(lambda best, entry: entry if self.prefers(entry, best) else best, unbeaten)
        faster = (e for e in better if e.worst_case == "passed" and self.speedup(e).low > self.speedup(raced[0]).high)
        return next((e for e in faster if not self.beats(best, e)), best)

    def beats(self, entry: Entry, other: Entry) -> bool:
        """True where a race of the two shows an entry to be better beyond noise."""
        return (gain := self.pair(other, entry)) is not None and gain.value > 1.0 and gain.is_apart(TIE)

    def prefers(self, entry: Entry, leader: Entry) -> bool:
        """True where an entry is to be recommended before one that led so far: better beyond the noise of their race,
        or as good (without one: by speed-ups) and simpler. Of as many changes the nearer win only near a tie."""
        if self.beats(entry, leader) or self.beats(leader, entry):
            return self.beats(entry, leader)
        seen = (race := self.pair(leader, entry)) or self.speedup(entry).over(self.speedup(leader))
        if len(self.changed(entry.knobs)) == len(self.changed(leader.knobs)) and seen.differs(TIE):
            return seen.value > 1.0
        as_good = race is not None or self.speedup(entry).value >= self.speedup(leader).low
        return as_good and self.is_simpler(entry, leader)

    def is_simpler(self, entry: Entry, other: Entry) -> bool:
        """True where an entry changes fewer knobs than another, or as many and numbers by less."""
        return distance(entry.knobs, self.baseline_knobs) < distance(other.knobs, self.baseline_knobs)

    def _step_ratio(self, entry: Entry) -> float:
        if entry.race is not None:
            return self.worth(entry.config) / entry.race.speedup.value
        return self.seconds(entry) / self.seconds(self.baseline)


def _larger(*peaks: int | None) -> int | None:
    return max((peak for peak in peaks if peak is not None), default=None)
