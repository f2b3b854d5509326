"""Interleaved race of combinations on the same prompts, so that a disturbance of the machine slows all.

Each round gives one ratio of two's seconds per step; the ratio is the median of them with its bootstrap interval. The
winner is raced against the user's configuration, where they fit side by side together with what may be as good: itself
without one change, and what comes close to it. What is left undecided is raced in pairs. Rounds go on while noise hides
which is better, and there is time.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from grpo_autotune.knobs import Knobs
from grpo_autotune.predict.models import stage_seconds
from grpo_autotune.predict.objective import Interval, median_interval
from grpo_autotune.records.search import RaceRow
from grpo_autotune.records.trial import TrialOutcome
from grpo_autotune.search.ablation import SMALL
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.leaderboard import TIE, Entry, RaceResult
from grpo_autotune.search.study import name_of

FIRST_ROUNDS = 5
MORE_ROUNDS = 5
MOST_ROUNDS = 20
LEAST_ROUNDS = 3
"""Fewer pairs than this have no interval worth the name."""
CLOSE_ROUNDS, MOST_CLOSE_ROUNDS = 10, 80
"""The same of two that are close: as many at a time as take no longer than starting both, and at most."""
SPEED_MARGIN = 1.2
"""A round may take this much longer than all trials' medians say."""


class _Race:
    """Seconds of each round of the combinations of a race, and by stage those of their last steps."""

    def __init__(self, evaluator: Evaluator, lanes: Sequence[Knobs]) -> None:
        self._evaluator, self._board, self.lanes = evaluator, evaluator.board, lanes
        self.keep = evaluator.log.task.folder.keep_race
        known = self._known(name_of(lanes[0]), name_of(lanes[1]))
        self.rounds: list[tuple[float, ...]] = [*known] if len(lanes) == 2 else []
        self._stages_s: list[dict[str, float]] = [{} for _ in lanes]

    def _known(self, one: str, other: str) -> list[tuple[float, float]]:
        """Rounds of two that they made before."""
        undecided = self._evaluator.undecided
        return undecided.get((one, other)) or [(second, first) for first, second in undecided.get((other, one), [])]

    def add(self, outcomes: Sequence[TrialOutcome]) -> None:
        """Enter the rounds that all have made; the last may have been cut short."""
        self.rounds += zip(*(outcome.step_s for outcome in outcomes), strict=False)
        self._stages_s = [stage_seconds(one.record.timings) if one.record else {} for one in outcomes]

    def judge(self, before: int, after: int, confidence: float) -> bool:
        """True where one lane's score over that of another is told; else their rounds stay for a race of both. It is
        noted, and kept in the search's folder, once rounds are enough for a verdict."""
        first, second = (self._board.entries[name_of(self.lanes[lane])] for lane in (before, after))
        names = name_of(first.knobs), name_of(second.knobs)
        if (decided := self._evaluator.is_decided(first, second)) or len(self._known(*names)) > len(self.rounds):
            return decided
        self._evaluator.undecided.pop(names[::-1], None)
        self._evaluator.undecided[names] = [(row[before], row[after]) for row in self.rounds]
        ratio = self.result(before, after, confidence).speedup
        if ratio.n < fewest_rounds(confidence) and not is_equal(ratio):
            return False
        self._board.note_pair(first, second, ratio)
        self.keep(RaceRow(before=first.knobs, rival=second.knobs, speedup=ratio))
        if told := is_told(ratio):
            del self._evaluator.undecided[names]
        return told

    def result(self, before: int, after: int, confidence: float) -> RaceResult:
        """One lane's score over that of another, and both's seconds per step."""
        board, lanes = self._board, (before, after)
        first, second = (board.entries[name_of(self.lanes[lane])] for lane in lanes)
        apart_s = [board.apart_s(self._stages_s[lane]) for lane in lanes]
        ratios = [(row[before] + apart_s[0]) / (row[after] + apart_s[1]) for row in self.rounds]
        worth = board.worth(second.config) / board.worth(first.config)
        speedup = board.bounded(median_interval(ratios, confidence).times(worth), first, second)
        before_s, after_s = (median_interval([row[lane] for row in self.rounds], confidence) for lane in lanes)
        return RaceResult(speedup, step=after_s, baseline_step=before_s)


def race(evaluator: Evaluator, rival: Entry, room_s: float, beside: Sequence[Knobs] = ()) -> Entry:
    """Race a combination against the user's configuration, with others `beside` it; its entry with the result, as it
    was where there was no time, and barred from winning where it failed."""
    board = evaluator.board
    rounds, sure = first_rounds(board.confidence, len(beside)), _confidence_beside(board.confidence, len(beside))
    lanes = [board.baseline_knobs, rival.knobs, *beside]
    for seen in _looks(evaluator, lanes, room_s, (rounds, MORE_ROUNDS, MOST_ROUNDS)):
        for lane, knobs in enumerate(seen.lanes[1:], 1):
            before = board.entries[name_of(knobs)]
            if before.race is None or before.race.speedup.n < len(seen.rounds):
                result = seen.result(0, lane, board.confidence)
                seconds = {"step": result.step, "before_step": result.baseline_step}
                seen.keep(RaceRow(before=board.baseline_knobs, rival=knobs, speedup=result.speedup, **seconds))
                board.update(before, race=result)
        for one, other in itertools.combinations(range(1, len(seen.lanes)), 2):
            seen.judge(one, other, sure)
        rival = board.entries[name_of(rival.knobs)]
        if rival.race is not None and is_over(rival.race.speedup):
            break
    return board.entries[name_of(rival.knobs)]


def is_over(speedup: Interval) -> bool:
    """True of a race with the user's configuration that needs no more rounds, or may have none."""
    return speedup.low > 1.0 or speedup.high < 1.0 or speedup.n >= MOST_ROUNDS


def compare(evaluator: Evaluator, leader: Entry, rival: Entry, room_s: float) -> bool:
    """Race two combinations that may be as good, until one is better beyond noise, or they are shown to be about
    equal. False where they were started and made no round."""
    pair_s = race_s(evaluator, rival, 1, leader) - race_s(evaluator, rival, 0, leader)
    rounds = max(FIRST_ROUNDS, min(CLOSE_ROUNDS, int(race_s(evaluator, rival, 0, leader) / pair_s)))
    confidence, trials, made = confidence_of(evaluator.board.confidence, rounds), len(evaluator.log.rows), False
    for seen in _looks(evaluator, [leader.knobs, rival.knobs], room_s, (rounds, rounds, MOST_CLOSE_ROUNDS)):
        made = True
        if seen.judge(0, 1, confidence):
            break
    return made or len(evaluator.log.rows) == trials


def is_told(ratio: Interval) -> bool:
    """True of a race of two that are close where one is better beyond noise, both are about equal, or there are no more
    rounds."""
    return ratio.is_apart(TIE) or is_equal(ratio) or ratio.n >= MOST_CLOSE_ROUNDS


def is_equal(ratio: Interval) -> bool:
    """True where nothing that counts lies between two."""
    return 1.0 / SMALL < ratio.low <= ratio.high < SMALL


def fewest_rounds(confidence: float) -> int:
    """Rounds that equals win all of, or lose all of, more seldom than a verdict may be wrong."""
    return math.ceil(1.0 - math.log2(1.0 - confidence))


def confidence_of(confidence: float, rounds: int) -> float:
    """Of each look at two that are close, so many rounds after the one before, for all looks to be as sure as
    `confidence` together (Bonferroni's bound)."""
    return 1.0 - (1.0 - confidence) * rounds / MOST_CLOSE_ROUNDS


def first_rounds(confidence: float, beside: int) -> int:
    """Rounds of a race with the user's configuration before the first look; enough to tell those beside the rival from
    it and from each other."""
    return max(FIRST_ROUNDS, fewest_rounds(_confidence_beside(confidence, beside))) if beside else FIRST_ROUNDS


def _confidence_beside(confidence: float, beside: int) -> float:
    """Of the verdict on each two of a rival and so many beside it, for all to be as sure as `confidence` together."""
    return 1.0 - (1.0 - confidence) / max(1, math.comb(beside + 1, 2))


def _looks(
    evaluator: Evaluator, lanes: Sequence[Knobs], room_s: float, rounds: tuple[int, int, int]
) -> Iterator[_Race]:
    """A race after the first so many rounds, then after more, and at most. Where not all run side by side, it is begun
    anew with the first two; of these a rival that fails is barred from winning, but one whose memory ran out beside
    another than the user's."""
    board, budget, seen = evaluator.board, evaluator.budget, _Race(evaluator, lanes)
    end_s, (wanted, more, most) = budget.elapsed_s + room_s, rounds
    while len(seen.rounds) < most:
        before, rival = (board.entries[name_of(knobs)] for knobs in lanes[:2])
        left_s, beside = end_s - budget.elapsed_s, lanes[2:]
        fitting = min(wanted, rounds_that_fit(evaluator, rival, left_s, before, beside))
        outcomes = evaluator.race(lanes, fitting, left_s) if fitting >= LEAST_ROUNDS else []
        failed = [one.status not in ("ok", "timeout") or not one.step_s for one in outcomes]
        if beside and (not outcomes or any(failed)):
            lanes = seen.lanes = lanes[:2]
            seen.rounds = [row[:2] for row in seen.rounds]
            continue
        if not outcomes:
            return
        one, other = outcomes[:2]
        if one.status == "ok" and other.status not in ("ok", "timeout"):
            if other.status != "oom" or before.knobs == board.baseline_knobs:
                why = f"failed in the race: {other.why or other.status}"
                evaluator.log.task.folder.keep_race(RaceRow(before=before.knobs, rival=rival.knobs, fails=why))
                board.update(rival, fails=why, race=None)
            return
        before_n = len(seen.rounds)
        seen.add(outcomes)
        for knobs, outcome in zip(lanes[1:], outcomes[1:], strict=True):
            if len(seen.rounds) >= LEAST_ROUNDS:
                cycle = outcome.record.timings.cycle if outcome.record else 1  # of whose mean a round is
                steps_s = [s for s in outcome.step_s for _ in range(cycle)]
                evaluator.enter(knobs, outcome.model_copy(update={"step_s": steps_s}))
            if (entry := board.entry(knobs)) is not None:
                living = outcome.record.living_share if outcome.record else entry.living_share
                board.add_peak(entry, outcome.peak_bytes, living_share=living)
        if len(seen.rounds) < LEAST_ROUNDS or len(seen.rounds) == before_n:
            return
        yield seen
        wanted = more


def race_s(
    evaluator: Evaluator,
    rival: Entry,
    rounds: int = LEAST_ROUNDS,
    before: Entry | None = None,
    beside: Sequence[Knobs] = (),
    *,
    alone: bool = False,
) -> float:
    """Seconds of a race, by default of the shortest, and against the user's configuration: all start side by side, warm
    up, and run the rounds; `alone`, after a trial that leaves no second process. With an engine in one of them each
    block starts and warms up anew (`trials.parent.interleave`); of two in a row the second may find its process
    warm."""
    before, board = before or evaluator.board.baseline, evaluator.board
    round_s = (before.step.value + rival.step.value) * rival.cycle
    if before.config.use_vllm or rival.config.use_vllm:
        return (rounds + 1) * evaluator.costs.cold_s + SPEED_MARGIN * 2 * rounds * round_s
    for knobs in beside:
        entry = board.entry(knobs)
        step = entry.step if entry is not None else evaluator.models.step_s(board.config_of(knobs))
        round_s += step.value * rival.cycle
    start_s = evaluator.costs.starts_s(2 + len(beside), warm=evaluator.log.has_pair and not alone)
    return start_s + SPEED_MARGIN * rounds * round_s


def rounds_that_fit(
    evaluator: Evaluator, rival: Entry, room_s: float, before: Entry | None = None, beside: Sequence[Knobs] = ()
) -> int:
    """Rounds after all have started and made a step to warm up."""
    start_s = race_s(evaluator, rival, 0, before, beside)
    return max(0, int((room_s - start_s) / (race_s(evaluator, rival, 1, before, beside) - start_s)))
