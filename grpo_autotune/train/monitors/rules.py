"""The rules of the monitors: what each reads in a line of the log, and when that is bad."""

import math
import re
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from grpo_autotune.records.alerts import number
from grpo_autotune.records.evaluations import Evaluation, evaluations
from grpo_autotune.records.probe import NO_SIGNAL

WARMUP = 5  # steps at the start that no baseline is taken from
FIRST_STEPS, FIRST_EVENTS = 20, 5  # steps after them that one is taken from, and log events that these make at least
RECENT, LEAST = 128, 20  # log events that a spike is measured against, at most (OLMo-core) and at least
TREND = 10  # log events that a reward is the mean of
MOST_FAILED = 0.5  # share of scores whose failure fires at once
BAND = 2.0  # factor beyond a branch's band from which its KL is told (RLlib's `update_kl`)
FAILED = re.compile("rewards/.+/failed")
LENGTH, CUT, EQUAL = "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"

Row = Mapping[str, Any]
Readings = Iterator["Reading"]


class Reading(NamedTuple):
    """A metric as a rule reads it."""

    metric: str
    value: float
    bad: bool
    limit: float | None = None
    baseline: float | None = None
    text: str = ""  # in place of the comparison with the limit
    remedy: str = ""  # in place of the rule's
    at_once: bool = False  # without persistence


def _level(row: Row, name: str, limit: float, *, below: bool = False, baseline: float | None = None) -> Readings:
    value = number(row, name)
    if value is not None and limit > 0.0:
        yield Reading(name, value, value < limit if below else value > limit, limit, baseline)


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    """Median and sigma, 1.4826 times the median absolute deviation (Rousseeuw & Croux 1993), of at least one value."""
    median = statistics.median(values)
    return median, 1.4826 * statistics.median(abs(value - median) for value in values)


class Run:
    """A training as far as its log tells, with what that does not hold: `beta`, whether truncated completions are
    masked, the highest reward of a completion (0 if unknown), and the KL band of each branch. The method of a monitor's
    name is its rule, which takes a line of the log and the monitor's section."""

    def __init__(self, beta: float = 0.0, masks: bool = False, highest: float = 0.0, bands: Any = None) -> None:
        self.beta, self.masks, self.highest, self.bands, self.step = beta, masks, highest, bands or {}, 0
        self.evaluations: dict[str, list[tuple[Evaluation, float]]] = defaultdict(list)  # and the reward of training
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self.baselines: dict[str, tuple[float, ...]] = defaultdict(tuple)  # median and sigma, once they are frozen
        self._first: dict[str, list[float]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Take a line of the log."""
        for done in evaluations([row]):
            self.evaluations[done.series].append((done, self.reward()))
        self.step = row["step"] if row["kind"] == "train" else self.step
        for name in row if row["kind"] == "train" else ():
            if (value := number(row, name)) is not None:
                self.recent[name].append(value)
                first = self._first[name]
                if self.step > WARMUP and name not in self.baselines:
                    first.append(value)
                    if self.step >= WARMUP + FIRST_STEPS and len(first) >= FIRST_EVENTS:
                        self.baselines[name] = spread_of(first)

    def reward(self) -> float:
        """Mean of the newest rewards in training, NaN without any."""
        tail = list(self.recent["reward"])[-TREND:]
        return statistics.fmean(tail) if tail else math.nan

    def gained(self) -> bool:
        """True if a held-out reward has risen beyond its intervals; without, if that of training has by a sigma."""
        held_out = [done for done in self.evaluations.values() if len(done) > 1]
        level = sum(self.baselines.get("reward", (math.inf,)))
        return any(done[-1][0].low > done[0][0].high for done in held_out) if held_out else self.reward() > level

    def not_finite(self, row: Row, item: Any) -> Readings:
        has_failed = any(name.endswith("/failed") and row[name] for name in row)  # for `judge_failures` to tell
        for name in filter(row.__contains__, ("loss", "grad_norm", "kl", "entropy", *["reward"][has_failed:])):
            yield Reading(name, math.nan, number(row, name) is None, text=f"{name} is no finite number")

    def loss_spike(self, row: Row, item: Any) -> Readings:
        spiked = False
        for name, to, back in (("grad_norm", math.log, math.exp), ("loss", float, float)):  # norms spread by factors
            value, values = number(row, name), [to(past) for past in self.recent[name] if past > 0.0 or name == "loss"]
            if value is not None and len(values) >= LEAST:
                median, sigma = spread_of(values)
                limit = back(min(median + item.above * sigma, 700.0))  # beyond 709 `exp` overflows
                bad = value > limit and sigma > 0.0 and not spiked
                spiked = spiked or bad
                yield Reading(name, value, bad, limit, back(median))

    def kl_high(self, row: Row, item: Any) -> Readings:
        limits = {f"branch/{name}/kl": BAND * high for name, (_, high) in self.bands.items()}
        for name, limit in {"kl": max(item.above, *limits.values(), 0.0), **limits}.items():
            yield from _level(row, name, limit)

    def kl_low(self, row: Row, item: Any) -> Readings:
        limits = {"kl": item.below, **{f"branch/{name}/kl": low / BAND for name, (low, _) in self.bands.items()}}
        for name, limit in limits.items():
            if any(past >= limit for past in self.recent[name]):  # it is low at first
                yield from _level(row, name, limit, below=True)

    def entropy_collapse(self, row: Row, item: Any) -> Readings:
        for base in self.baselines.get("entropy", ())[:1]:
            yield from _level(row, "entropy", item.below * base, below=True, baseline=base)

    def length_drift(self, row: Row, item: Any) -> Readings:
        value = number(row, LENGTH) or 0.0
        for base in self.baselines.get(LENGTH, ())[:1] if value else ():
            far, limit = item.above * base, base + math.copysign(item.above * base, value - base)
            yield Reading(LENGTH, value, abs(value - base) > far and not self.gained(), limit, base)

    def dead_groups(self, row: Row, item: Any) -> Readings:
        yield from _level(row, EQUAL, item.above)

    def truncated(self, row: Row, item: Any) -> Readings:
        yield from _level(row, CUT, item.above)

    def reward_ceiling(self, row: Row, item: Any) -> Readings:
        yield from _level(row, "reward", item.above * (item.maximum or self.highest))

    def held_out_gap(self, row: Row, item: Any) -> Readings:
        for now in evaluations([row]):
            earlier = self.evaluations[now.series]
            best, then = max(earlier, key=lambda done: done[0].scored, default=(now, math.inf))
            bad = now.high < best.low and self.reward() > then
            text = f"below the {best.scored:.3g} of step {best.step}, and training's reward has risen since"
            if earlier:
                yield Reading(f"reward on {now.series} data", now.scored, bad, best.low, best.scored, text)

    def judge_failures(self, row: Row, item: Any) -> Readings:
        for name in filter(FAILED.fullmatch, row):
            for reading in _level(row, name, item.above):
                yield reading._replace(at_once=reading.value > MOST_FAILED)

    def memory_creep(self, row: Row, item: Any) -> Readings:
        for reading in _level(row, "memory_share", item.above):
            shares = [*self.recent["memory_share"], reading.value][-item.steps - 1 :]
            grows = len(shares) > item.steps and all(before < after for before, after in pairwise(shares))
            yield reading._replace(bad=reading.bad and grows, at_once=True)

    def nothing_learned(self, row: Row, item: Any) -> Readings:
        norm, failed = number(row, "grad_norm"), [number(row, name) or 0.0 for name in filter(FAILED.fullmatch, row)]
        cause = "failed" if max(failed, default=0.0) > MOST_FAILED else "equal" if row.get(EQUAL) == 1.0 else "zero"
        cause = "masked" if self.masks and row.get(CUT) == 1.0 else cause
        what, _, remedy = NO_SIGNAL[cause].partition(": ")
        what += ", and beta is 0" if cause == "equal" and self.beta == 0.0 else ""
        if norm is not None:
            yield Reading("grad_norm", norm, norm == 0.0, text=what, remedy=remedy)
