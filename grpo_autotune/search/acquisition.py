"""Acquisition by expected improvement: the legal combination with the largest expected gain over the best so far.

Seconds per step are taken as log-normal with the models' interval, so that a combination that is predicted slower but
unsure may still come before one that is surely a little faster. A combination that needs too much memory, or loses at
the hopeful end of its prediction, is not run; the reason is kept.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scipy.special import ndtr

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.apply import why_not
from grpo_autotune.knobs.table import REACH
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import Interval, run_ratio
from grpo_autotune.predict.room import LEAST_CHANCE, LEAST_SIGMA, MEMORY_SHARE, Z_90, chance_to_fit
from grpo_autotune.records.search import Skipped
from grpo_autotune.search.leaderboard import JUDGED_BY_REWARDS, TIE, Leaderboard, Level
from grpo_autotune.search.noninferiority import NO_TIME
from grpo_autotune.search.space import Space, points
from grpo_autotune.search.study import name_of

MOST_POINTS = 1000
"""Combinations that are looked at; beyond it, those with the fewest changes and the neighbours of the best."""
BUSY_TIE = 0.1
"""`TIE` of first predictions where others took the machine's time while the probe measured."""
LEVELS: tuple[Level, ...] = ("exact", "open", "fast")


class Proposal(NamedTuple):
    """A combination worth measuring, as it is predicted."""

    knobs: Knobs
    step_s: float  # seconds per step; `slow_s`: their upper end
    slow_s: float
    score: float
    gain: float  # expected in the logarithm of the score


@dataclass
class Ranking:
    """Proposals, best first, and the combinations left out by reason."""

    proposals: list[Proposal]
    skipped: dict[str, list[Knobs]] = field(default_factory=dict)

    def rows(self) -> list[Skipped]:
        """The reasons with how many combinations each concerns."""
        return [
            Skipped(why=why, count=len(left_out), example=left_out[0])
            for why, left_out in sorted(self.skipped.items(), key=lambda item: -len(item[1]))
        ]


class Pool:
    """The legal combinations of a space, worked out once."""

    def __init__(self, space: Space, config: RunConfig, machine: Machine) -> None:
        self.space, self._config, self._machine = space, config, machine
        first = itertools.islice(points(space, config, machine), MOST_POINTS)
        self.points = {name_of(knobs): knobs for knobs in first}
        self.whole = len(self.points) < MOST_POINTS

    def add_neighbours(self, knobs: Knobs) -> None:
        """Add the legal combinations with one knob other than here, unless the space was looked at whole."""
        if self.whole:
            return
        for key, axis in self.space.values.items():
            for value in axis:
                neighbour = {**knobs, key: value}
                if name_of(neighbour) not in self.points and why_not(self._config, neighbour, self._machine) is None:
                    self.points[name_of(neighbour)] = neighbour


def rank(candidates: Sequence[Knobs], board: Leaderboard, models: Models, memory_bytes: int | None) -> Ranking:
    """Judge legal combinations that nobody has measured by the models; None as `memory_bytes` leaves memory alone. The
    largest expected gain comes first; while only the user's own is measured, the best predicted score, of those that
    need no proof if there are any. Of about equal ones, that with the fewest changes."""
    best = {level: _best_score(board, level) for level in LEVELS}
    ranking = Ranking([])

    def order(proposal: Proposal) -> tuple[float, ...]:
        return -round(proposal.gain / TIE), len(board.changed(proposal.knobs)), -proposal.gain

    for knobs in candidates:
        level = next(level for level in LEVELS if board.allows(knobs, level))
        proposal, why = _judge(knobs, board, models, memory_bytes, best[level])
        if proposal is not None:
            ranking.proposals.append(proposal)
        else:
            ranking.skipped.setdefault(why, []).append(knobs)
    if len(board.entries) == 1:  # a rival that may be taken as it is: later ones, unsure or unproven, have to beat it
        ranking.proposals.sort(key=_by_prediction(board, ranking.proposals))
    else:
        ranking.proposals.sort(key=order)
    return ranking


def _by_prediction(board: Leaderboard, proposals: Sequence[Proposal]) -> Callable[[Proposal], tuple[float, ...]]:
    """Sort key: those that need no proof, by score, and of those as good as the best the ones with fewer changes."""
    proven = [proposal.score for proposal in proposals if not _is_unproven(board, proposal.knobs)]
    busy = board.record.others is not None and board.record.others.matters
    enough = (1.0 - (BUSY_TIE if busy else TIE)) * max(proven, default=math.inf)

    def key(proposal: Proposal) -> tuple[float, ...]:
        unproven = _is_unproven(board, proposal.knobs)
        equal = not unproven and proposal.score >= enough
        return unproven, not equal, len(board.changed(proposal.knobs)) if equal else 0, -proposal.score

    return key


def _is_unproven(board: Leaderboard, knobs: Knobs) -> bool:
    return any(board.evidence(key, knobs[key]) == "unproven" for key in board.learning(knobs))


def _best_score(board: Leaderboard, level: Level) -> float:
    """The score that a combination has to beat: those that leave learning alone compete among themselves, for each file
    is asked for; so do those that are or may be proven, or a value that was refuted would keep them from being tried;
    one that never can be has to beat all."""
    rivals = [entry for entry in board.entries.values() if board.may_win(entry, level)]
    return max(board.score(entry.config, board.seconds(entry)) for entry in rivals)


def _judge(
    knobs: Knobs, board: Leaderboard, models: Models, memory_bytes: int | None, best: float
) -> tuple[Proposal | None, str]:
    if (why := _why_unproven(knobs, board) or _why_idle(knobs, board)) is not None:
        return None, why
    config = board.config_of(knobs)
    chance = chance_to_fit(models, config, memory_bytes)
    if chance < LEAST_CHANCE:
        return None, f"predicted to need more than {MEMORY_SHARE:.0%} of the memory, or not surely less"
    step, baseline_s = run_s(board, models, config), board.seconds(board.baseline)
    hopeful = board.score(config, max(step.low, 1e-9))
    if hopeful <= best:
        return None, "slower than the best even at the hopeful end of its prediction"
    if board.is_too_long(config, step.low / baseline_s):
        return None, "the configured run would take longer (search.allow_longer_run)"
    score = board.score(config, step.value)
    if board.is_too_long(config, step.value / baseline_s):
        # Its median run is too long: what counts is the chance that it is not.
        allowed_s = baseline_s / run_ratio(config, board.config, 1.0)
        score = min(score, score * allowed_s / step.value)
    sigma = max(LEAST_SIGMA, math.log(step.high / max(step.low, 1e-9)) / (2 * Z_90))
    gain = chance * expected_gain(math.log(score / best), sigma)
    return Proposal(knobs, step.value, step.high, score, gain), ""


def run_s(board: Leaderboard, models: Models, config: RunConfig) -> Interval:
    """Predicted seconds per step of a run, its evaluations and checkpoints included."""
    step = models.step_s(config)
    aside_s = board.apart_s({name: stage.value for name, stage in models.stages_s(config).items()})
    return Interval(step.value + aside_s, step.low + aside_s, step.high + aside_s, step.n)


def _why_unproven(knobs: Knobs, board: Leaderboard) -> str | None:
    """The reason why a combination can never be proven to learn the same, if there is one."""
    if board.is_group_unknown(knobs):
        return "no spread of rewards was seen, so nothing is known of other group sizes"
    for key in board.learning(knobs):
        if key in board.config.search.accept:
            continue
        guard = board.guard(key, knobs[key])
        if guard is not None and not guard.proven and key in JUDGED_BY_REWARDS:
            return f"{key} {knobs[key]} is not proven by its rewards"
        if guard is None and any(other.key == key and other.why == NO_TIME for other in board.guards.values()):
            return f"there is no time to compare the rewards of other values of {key}"
    return None


def _why_idle(knobs: Knobs, board: Leaderboard) -> str | None:
    """The reason why a combination cannot be told from one that was measured, if it cannot."""
    keys = [key for key in board.changed(knobs) if key in REACH]
    plain = board.entry(board.without(knobs, *keys))
    if plain is None or board.most(keys, plain, replace(plain, knobs=knobs)) > 1.0 + TIE:
        return None
    return "beside one that was measured they change only stages that take next to no time"


def expected_gain(mean: float, sigma: float) -> float:
    """Expected positive part of a normal variable."""
    z = mean / sigma
    return sigma * (z * float(ndtr(z)) + math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
