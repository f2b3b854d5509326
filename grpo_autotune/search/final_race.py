"""The race for the end: a combination against the user's configuration in turns on the same prompts, so that what slows
the machine slows both.

Each round gives one ratio of their seconds a step; the speed-up is the median ratio with its bootstrap interval. Rounds
go on while the interval holds 1 and there is time.
"""

from __future__ import annotations

from grpo_autotune.predict.objective import Interval, median_interval
from grpo_autotune.search.evaluator import Lab
from grpo_autotune.search.leaderboard import Entry, scaled

FIRST_ROUNDS = 5
MORE_ROUNDS = 5
MOST_ROUNDS = 20
LEAST_ROUNDS = 3
"""Fewer pairs than this have no interval worth the name."""
STARTS = 1.5
"""Cold starts that the two take who start side by side."""
SPEED_MARGIN = 1.2
"""A round may take this much longer than both trials' medians say."""


def race(lab: Lab, rival: Entry, room_s: float) -> Interval | None:
    """Race a combination against the user's configuration; its score over the user's, or null where there was no time.

    The entry keeps the result and the seconds a step of the race. A rival that fails is marked as failing.
    """
    book = lab.book
    end_s, pairs = lab.budget.elapsed_s + room_s, list[tuple[float, float]]()
    wanted = FIRST_ROUNDS
    while len(pairs) < MOST_ROUNDS:
        left_s = end_s - lab.budget.elapsed_s
        rounds = min(wanted, rounds_that_fit(lab, rival, left_s))
        if rounds < LEAST_ROUNDS:
            break
        found, why = _rounds(lab, rival, rounds, left_s)
        if why is not None:
            rival.fails, rival.raced = why, None
            return None
        pairs += found
        if len(pairs) < LEAST_ROUNDS:
            break
        ratios = [before / after for before, after in pairs]
        rival.raced = scaled(median_interval(ratios, book.confidence), book.worth(rival.config))
        rival.raced_own_s, rival.raced_s = (median_interval(side, book.confidence) for side in zip(*pairs, strict=True))
        if rival.raced.low > 1.0 or rival.raced.high < 1.0:
            break
        wanted = MORE_ROUNDS
    return rival.raced


def race_s(lab: Lab, rival_s: float) -> float:
    """Seconds of the shortest race: both start side by side, warm up, and run the fewest rounds that count."""
    return STARTS * lab.costs.cold_s + SPEED_MARGIN * (LEAST_ROUNDS + 1) * (lab.book.baseline.step.value + rival_s)


def rounds_that_fit(lab: Lab, rival: Entry, room_s: float) -> int:
    """Rounds after both have started and made a step to warm up."""
    pair_s = SPEED_MARGIN * (lab.book.baseline.step.value + rival.step.value) * rival.cycle
    return max(0, int((room_s - STARTS * lab.costs.cold_s) / pair_s) - 1)


def _rounds(lab: Lab, rival: Entry, rounds: int, left_s: float) -> tuple[list[tuple[float, float]], str | None]:
    """Seconds a step of both, round by round, or why the rival failed; the last round may have been cut short."""
    book = lab.book
    first = lab.spec("timed", book.baseline.config, book.own, left_s, steps=1, source="race")
    second = lab.spec("timed", rival.config, rival.knobs, left_s, steps=1, source="race")
    second = second.model_copy(update={"number": first.number + 1})
    lab.show(second)
    own, other = lab.runner.race([first, second], rounds=rounds, deadline_s=left_s)
    lab.write(first, own)
    lab.write(second, other)
    lab.remember()
    if own.status == "ok" and other.status not in ("ok", "timeout"):
        return [], f"failed in the race: {other.why or other.status}"
    rival.saw_peak(other.peak_bytes)
    return list(zip(own.step_s, other.step_s, strict=False)), None
