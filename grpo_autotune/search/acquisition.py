"""What to measure next, by the models: the legal combination whose gain over the best so far is expected to be largest.

Seconds a step are taken as log-normal with the models' interval, so that a combination that is predicted slower but
unsure may still come before one that is surely a little faster. What needs too much memory, or loses at its most
hopeful, is not run; the reason is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from scipy.special import ndtr

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.predict.objective import Interval, run_ratio
from grpo_autotune.predict.room import LEAST_CHANCE, LEAST_SIGMA, MEMORY_SHARE, Z_90, chance_to_fit
from grpo_autotune.records.search import Skipped
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.leaderboard import GROUP, JUDGED_BY_REWARDS, Book, Level
from grpo_autotune.search.space import Space, points
from grpo_autotune.search.study import name_of

MOST_POINTS = 1000
"""Combinations that are looked at; beyond it, those with the fewest changes and the neighbours of the best."""
LEVELS: tuple[Level, ...] = ("exact", "open", "fast")


class Models(Protocol):
    """What a search asks of its models (`grpo_autotune.predict.models.Models`)."""

    def step_s(self, config: RunConfig) -> Interval: ...
    def stages_s(self, config: RunConfig) -> dict[str, Interval]: ...
    def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Interval: ...
    def learn(self, config: RunConfig, outcome: TrialOutcome) -> Models: ...
    def errors(self) -> dict[str, dict[str, float]]: ...


class Proposal(NamedTuple):
    """A combination worth measuring: predicted seconds (middle and upper end), score, and expected gain in the
    logarithm of the score."""

    knobs: Knobs
    step_s: float
    slow_s: float
    score: float
    gain: float


@dataclass
class Ranking:
    """What may be measured, best first, and what was left out and why."""

    proposals: list[Proposal]
    skipped: dict[str, list[Knobs]] = field(default_factory=dict)

    def rows(self) -> list[Skipped]:
        """The reasons with how many combinations each concerns."""
        return [
            Skipped(why=why, count=len(found), example=found[0])
            for why, found in sorted(self.skipped.items(), key=lambda item: -len(item[1]))
        ]


class Pool:
    """The legal combinations of a space, worked out once."""

    def __init__(self, space: Space, config: RunConfig, machine: Machine, most: int = MOST_POINTS) -> None:
        self._space, self._config, self._machine = space, config, machine
        self.points = {name_of(knobs): knobs for knobs in itertools.islice(points(space, config, machine), most)}
        self.whole = len(self.points) < most

    def add_neighbours(self, knobs: Knobs) -> None:
        """In a space too large to look at whole: the legal combinations with one knob other than here."""
        if not self.whole:
            self.points |= {name_of(found): found for found in self._neighbours(knobs)}

    def _neighbours(self, knobs: Knobs) -> Iterator[Knobs]:
        for key in self._space.keys:
            for value in self._space.values[key]:
                found = {**knobs, key: value}
                if name_of(found) not in self.points and why_not(self._config, found, self._machine) is None:
                    yield found


def rank(pool: Sequence[Knobs], book: Book, models: Models, memory_bytes: int | None) -> Ranking:
    """Judge combinations by the models.

    Args:
        pool: Legal combinations that nobody has measured.
        book: What is known; it holds the user's configuration.
        models: Fitted to everything measured so far.
        memory_bytes: What a trial may take; null leaves memory alone.

    Returns:
        The largest expected gain first; while only the user's own is measured, the best predicted score, of those that
        need no proof if there are any.
    """
    best = {level: _best_score(book, level) for level in LEVELS}
    found = Ranking([])
    for knobs in pool:
        level = next(level for level in LEVELS if book.allows(knobs, level))
        proposal, why = _judge(knobs, book, models, memory_bytes, best[level])
        if proposal is not None:
            found.proposals.append(proposal)
        else:
            found.skipped.setdefault(why, []).append(knobs)
    if len(book.entries) == 1:  # a rival that may be taken as it is: what is unsure or needs proof is judged against it
        found.proposals.sort(key=lambda proposal: (_needs_proof(book, proposal.knobs), -proposal.score))
    else:
        found.proposals.sort(key=lambda proposal: -proposal.gain)
    return found


def _needs_proof(book: Book, knobs: Knobs) -> bool:
    return any(book.proof(key, knobs[key]) == "unproven" for key in book.learning(knobs))


def _best_score(book: Book, level: Level) -> float:
    """What a combination has to beat: those that leave learning alone compete among themselves, for each file is asked
    for; so do those that are or may be proven, or a value that was refuted would keep them from being tried; one that
    never can be has to beat all."""
    found = [entry for entry in book.entries.values() if book.may(entry, level)]
    return max(book.score(entry.config, entry.step.value) for entry in found)


def _judge(
    knobs: Knobs, book: Book, models: Models, memory_bytes: int | None, best: float
) -> tuple[Proposal | None, str]:
    if book.living is None and GROUP in book.changed(knobs):
        return None, "no spread of rewards was seen, so nothing is known of other group sizes"
    for key in book.learning(knobs):
        guard = book.guard(key, knobs[key])
        if guard is not None and not guard.proven and key in JUDGED_BY_REWARDS and key not in book.config.search.accept:
            return None, f"{key} {knobs[key]} is not proven by its rewards"
        if guard is None and book.had_no_time(key) and key not in book.config.search.accept:
            return None, f"there is no time to compare the rewards of other values of {key}"
    config = book.config_of(knobs)
    chance = chance_to_fit(models, config, memory_bytes)
    if chance < LEAST_CHANCE:
        return None, f"predicted to need more than {MEMORY_SHARE:.0%} of the memory, or not surely less"
    step = models.step_s(config)
    hopeful = book.score(config, max(step.low, 1e-9))
    if hopeful <= best:
        return None, "slower than the best even at the hopeful end of its prediction"
    if book.longer(config, step.low / book.baseline.step.value):
        return None, "the configured run would take longer (search.allow_longer_run)"
    score = book.score(config, step.value)
    if book.longer(config, step.value / book.baseline.step.value):
        # Its median run is too long: what counts is the chance that it is not.
        allowed = book.baseline.step.value / run_ratio(config, book.config, 1.0)
        score = min(score, book.score(config, step.value) * allowed / step.value)
    sigma = max(LEAST_SIGMA, math.log(step.high / max(step.low, 1e-9)) / (2 * Z_90))
    gain = chance * expected_gain(math.log(score / best), sigma)
    return Proposal(knobs, step.value, step.high, score, gain), ""


def expected_gain(mean: float, sigma: float) -> float:
    """Expected positive part of a normal variable."""
    z = mean / sigma
    return sigma * (z * float(ndtr(z)) + math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
