"""Interleaved race of a combination against the user's configuration on the same prompts, so that a disturbance of the
machine slows both.

Each round gives one ratio of their seconds per step; the speed-up is the median ratio with its bootstrap interval.
Rounds go on while the interval holds 1 and there is time.
"""

from grpo_autotune.predict.models import stage_seconds
from grpo_autotune.predict.objective import median_interval
from grpo_autotune.search.evaluator import Evaluator
from grpo_autotune.search.leaderboard import Entry, RaceResult, scaled

FIRST_ROUNDS = 5
MORE_ROUNDS = 5
MOST_ROUNDS = 20
LEAST_ROUNDS = 3
"""Fewer pairs than this have no interval worth the name."""
STARTS = 1.5
"""Cold starts that the two take who start side by side."""
SPEED_MARGIN = 1.2
"""A round may take this much longer than both trials' medians say."""


def race(evaluator: Evaluator, rival: Entry, room_s: float) -> Entry:
    """Race a combination against the user's configuration; its entry with the result, as it was where there was no
    time, and barred from winning where it failed."""
    board, budget = evaluator.board, evaluator.budget
    end_s, pairs = budget.elapsed_s + room_s, list[tuple[float, float]]()
    wanted = FIRST_ROUNDS
    while len(pairs) < MOST_ROUNDS:
        left_s = end_s - budget.elapsed_s
        rounds = min(wanted, rounds_that_fit(evaluator, rival, left_s))
        if rounds < LEAST_ROUNDS:
            break
        baseline, other = evaluator.race(rival, rounds, left_s)
        if baseline.status == "ok" and other.status not in ("ok", "timeout"):
            return board.update(rival, fails=f"failed in the race: {other.why or other.status}", race=None)
        rival = board.add_peak(rival, other.peak_bytes)
        pairs += zip(baseline.step_s, other.step_s, strict=False)  # the last round may have been cut short
        if len(pairs) < LEAST_ROUNDS:
            break
        sides = [stage_seconds(side.record.timings) if side.record else {} for side in (baseline, other)]
        aside = [board.apart_s(stages_s) for stages_s in sides]
        ratios = [(before + aside[0]) / (after + aside[1]) for before, after in pairs]
        speedup = scaled(median_interval(ratios, board.confidence), board.worth(rival.config))
        speedup = board.bounded(speedup, board.baseline, rival)
        before_s, after_s = (median_interval(side, board.confidence) for side in zip(*pairs, strict=True))
        rival = board.update(rival, race=RaceResult(speedup, step=after_s, baseline_step=before_s))
        if speedup.low > 1.0 or speedup.high < 1.0:
            break
        wanted = MORE_ROUNDS
    return rival


def race_s(evaluator: Evaluator, rival: Entry, rounds: int = LEAST_ROUNDS) -> float:
    """Seconds of a race, by default of the shortest: both start side by side, warm up, and run the rounds. With an
    engine in one of them each block starts and warms up anew (`trials.parent.interleave`); of two in a row the second
    may find its process warm."""
    baseline = evaluator.board.baseline
    pair_s = (baseline.step.value + rival.step.value) * rival.cycle
    if baseline.config.use_vllm or rival.config.use_vllm:
        return (rounds + 1) * evaluator.costs.cold_s + SPEED_MARGIN * 2 * rounds * pair_s
    return STARTS * evaluator.costs.cold_s + SPEED_MARGIN * (rounds + 1) * pair_s


def rounds_that_fit(evaluator: Evaluator, rival: Entry, room_s: float) -> int:
    """Rounds after both have started and made a step to warm up."""
    start_s = race_s(evaluator, rival, 0)
    return max(0, int((room_s - start_s) / (race_s(evaluator, rival, 1) - start_s)))
