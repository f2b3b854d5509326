"""Interleaved race of two combinations on the same prompts, so that a disturbance of the machine slows both.

Each round gives one ratio of their seconds per step; the ratio is the median of them with its bootstrap interval. The
winner is raced against the user's configuration, and before that against what its trial does not surely beat. Rounds
go on while noise hides which is better, and there is time.
"""

import math
from collections.abc import Iterator

from grpo_autotune.predict.models import stage_seconds
from grpo_autotune.predict.objective import Interval, median_interval
from grpo_autotune.records.search import RaceRow
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
"""A round may take this much longer than both trials' medians say."""


def race(evaluator: Evaluator, rival: Entry, room_s: float) -> Entry:
    """Race a combination against the user's configuration; its entry with the result, as it was where there was no
    time, and barred from winning where it failed."""
    board = evaluator.board
    rounds = FIRST_ROUNDS, MORE_ROUNDS, MOST_ROUNDS
    for result in _results(evaluator, board.baseline, rival, room_s, rounds, board.confidence):
        rival = board.update(rival, race=result)
        if is_over(result.speedup):
            break
    return board.entries[name_of(rival.knobs)]


def is_over(speedup: Interval) -> bool:
    """True of a race with the user's configuration that needs no more rounds, or may have none."""
    return speedup.low > 1.0 or speedup.high < 1.0 or speedup.n >= MOST_ROUNDS


def compare(evaluator: Evaluator, leader: Entry, rival: Entry, room_s: float) -> None:
    """Race two combinations that may be as good, until one is better beyond noise, or they are shown to be about
    equal."""
    pair_s = race_s(evaluator, rival, 1, leader) - race_s(evaluator, rival, 0, leader)
    rounds = max(FIRST_ROUNDS, min(CLOSE_ROUNDS, int(race_s(evaluator, rival, 0, leader) / pair_s)))
    confidence = confidence_of(evaluator.board.confidence, rounds)
    fewest = fewest_rounds(confidence)
    for result in _results(evaluator, leader, rival, room_s, (rounds, rounds, MOST_CLOSE_ROUNDS), confidence):
        if result.speedup.n < fewest and not is_equal(result.speedup):
            continue
        evaluator.board.note_pair(leader, rival, result.speedup)
        if is_told(result.speedup):
            break


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


def _results(
    evaluator: Evaluator, before: Entry, rival: Entry, room_s: float, rounds: tuple[int, int, int], confidence: float
) -> Iterator[RaceResult]:
    """Score of a rival over that of another entry after the first so many rounds, then after more, and at most; a rival
    that fails is barred from winning, but one whose memory ran out beside another than the user's."""
    board, budget = evaluator.board, evaluator.budget
    end_s, pairs = budget.elapsed_s + room_s, list[tuple[float, float]]()
    folder = evaluator.log.task.folder
    wanted, more, most = rounds
    while len(pairs) < most:
        left_s = end_s - budget.elapsed_s
        fitting = min(wanted, rounds_that_fit(evaluator, rival, left_s, before))
        if fitting < LEAST_ROUNDS:
            return
        one, other = evaluator.race(before, rival, fitting, left_s)
        before = board.entries[name_of(before.knobs)]
        if one.status == "ok" and other.status not in ("ok", "timeout"):
            if other.status != "oom" or before.knobs == board.baseline_knobs:
                failed = f"failed in the race: {other.why or other.status}"
                folder.keep_race(RaceRow(before=before.knobs, rival=rival.knobs, fails=failed))
                board.update(rival, fails=failed, race=None)
            return
        living = other.record.living_share if other.record else rival.living_share
        rival = board.add_peak(rival, other.peak_bytes, living_share=living)
        pairs += zip(one.step_s, other.step_s, strict=False)  # the last round may have been cut short
        if len(pairs) < LEAST_ROUNDS:
            return
        sides = [stage_seconds(side.record.timings) if side.record else {} for side in (one, other)]
        aside = [board.apart_s(stages_s) for stages_s in sides]
        ratios = [(first + aside[0]) / (second + aside[1]) for first, second in pairs]
        worth = board.worth(rival.config) / board.worth(before.config)
        speedup = board.bounded(median_interval(ratios, confidence).times(worth), before, rival)
        before_s, after_s = (median_interval(side, confidence) for side in zip(*pairs, strict=True))
        row = RaceRow(before=before.knobs, rival=rival.knobs, speedup=speedup, step=after_s, before_step=before_s)
        folder.keep_race(row)
        yield RaceResult(speedup, step=after_s, baseline_step=before_s)
        wanted = more


def race_s(
    evaluator: Evaluator, rival: Entry, rounds: int = LEAST_ROUNDS, before: Entry | None = None, *, alone: bool = False
) -> float:
    """Seconds of a race, by default of the shortest, and against the user's configuration: both start side by side,
    warm up, and run the rounds; `alone`, after a trial that leaves no second process. With an engine in one of them
    each block starts and warms up anew (`trials.parent.interleave`); of two in a row the second may find its process
    warm."""
    before = before or evaluator.board.baseline
    pair_s = (before.step.value + rival.step.value) * rival.cycle
    if before.config.use_vllm or rival.config.use_vllm:
        return (rounds + 1) * evaluator.costs.cold_s + SPEED_MARGIN * 2 * rounds * pair_s
    start_s = evaluator.costs.pair_s(warm=False) if alone else evaluator.log.pair_s
    return start_s + SPEED_MARGIN * (rounds + 1) * pair_s


def rounds_that_fit(evaluator: Evaluator, rival: Entry, room_s: float, before: Entry | None = None) -> int:
    """Rounds after both have started and made a step to warm up."""
    start_s = race_s(evaluator, rival, 0, before)
    return max(0, int((room_s - start_s) / (race_s(evaluator, rival, 1, before) - start_s)))
