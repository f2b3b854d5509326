"""Non-inferiority of a knob that changes what is learned, from rewards on the same prompts.

Image size is judged by a paired non-inferiority test: the mean over prompts of (reward with the change - reward as the
user has it) must lie above `-max_reward_drop` with the configured confidence (one-sided t test). Each end of the
reported interval holds with that confidence on its own side.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, ttest_1samp
from scipy.stats import t as student

from grpo_autotune.knobs.apply import GROUP
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.search import Guard
from grpo_autotune.records.trial import PromptReward

NO_TIME = "there was no time to compare rewards"
LEAST_PROMPTS = 12
"""Below this many pairs a t interval says nothing about differences that are mostly zero."""
MOST_PROMPTS = 100_000


def judge_rewards(
    key: str,
    before: Any,
    after: Any,
    rewards_before: Sequence[PromptReward],
    rewards_after: Sequence[PromptReward],
    *,
    margin: float,
    confidence: float,
) -> Guard:
    """Non-inferiority of one value of a knob, from generation-only trials over the same prompts."""
    old, new = ({row.prompt: row for row in rows if row.rewards} for rows in (rewards_before, rewards_after))
    pairs = [(old[prompt], new[prompt]) for prompt in old if prompt in new]  # one that comes twice counts once
    plain: dict[str, Any] = {"key": key, "before": before, "after": after, "prompts": len(pairs)}
    if len(pairs) < LEAST_PROMPTS:
        why = f"only {len(pairs)} prompts were compared, and {LEAST_PROMPTS} are the least"
        return Guard(proven=False, why=why, prompts_needed=LEAST_PROMPTS, **plain)
    rewards = [reward for pair in pairs for side in pair for reward in side.rewards]
    difference = np.array([statistics.fmean(two.rewards) - statistics.fmean(one.rewards) for one, two in pairs])
    plain["truncated_before"] = statistics.fmean(_cut_share(one) for one, _ in pairs)
    plain["truncated_after"] = statistics.fmean(_cut_share(two) for _, two in pairs)
    if max(rewards) - min(rewards) <= 1e-6:
        why = "all rewards are equal, with the change and without: nothing can be shown"
        return Guard(proven=False, why=why, reward_difference=float(difference.mean()), **plain)
    mean, low, high = _one_sided_ends(difference, confidence)
    plain |= {"reward_difference": mean, "reward_low": low, "reward_high": high}
    text = f"reward {mean:+.3f} ({low:+.3f} to {high:+.3f}) over {len(pairs)} prompts, and {-margin:+.3f} is allowed"
    growth = np.array([_cut_share(two) - _cut_share(one) for one, two in pairs])
    if _one_sided_ends(growth, confidence)[1] > 0.0:
        cut = f"{plain['truncated_before']:.1%} -> {plain['truncated_after']:.1%}"
        why = f"more completions are cut off at max_completion_length, {cut}; {text}"
        return Guard(proven=False, why=why, **plain)
    if low > -margin:
        return Guard(proven=True, why=text, **plain)
    if high < -margin:
        return Guard(proven=False, why=f"the reward falls by more than is allowed: {text}", **plain)
    needed = prompts_that_settle(difference, margin, confidence)
    return Guard(proven=False, why=f"not settled: {text}", prompts_needed=needed, **plain)


def prompts_that_settle(difference: Sequence[float] | np.ndarray, margin: float, confidence: float) -> int | None:
    """Smallest number of pairs whose interval would lie on one side of `-margin`, mean and spread staying as they are;
    None where that is more than `MOST_PROMPTS`."""
    values = np.asarray(difference, dtype=float)
    gap, spread = abs(float(values.mean()) + margin), float(values.std(ddof=1))
    if gap == 0.0:
        return None
    count = max(LEAST_PROMPTS, math.ceil((float(norm.ppf(confidence)) * spread / gap) ** 2))
    while count <= MOST_PROMPTS:
        if float(student.ppf(confidence, count - 1)) * spread / math.sqrt(count) < gap:
            return count
        count += 1  # t is wider than the normal distribution it began with, by a few prompts
    return None


def judge_generations(before: int, after: int, living: Interval | None, speed: Interval) -> Guard:
    """Judge a value of `num_generations`: proven where useful completions per second (`speed`, over the user's) rise by
    more than all their noise, that of `living` included: the share of living groups at `after` over that at `before`,
    from the whole probe; None where no spread of rewards was seen."""
    plain: dict[str, Any] = {"key": GROUP, "before": before, "after": after}
    if living is None:
        why = "no group had any spread of rewards, so what a group teaches is unknown"
        return Guard(proven=False, why=why, **plain)
    low = speed.low * living.low / living.value
    text = f"useful completions per second x {speed.value:.2f}, at least x {low:.2f} with {living.n} groups' pass rates"
    return Guard(proven=low > 1.0, why=text if low > 1.0 else f"not beyond noise: {text}", prompts=living.n, **plain)


def _one_sided_ends(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    mean = float(values.mean())
    if float(values.std(ddof=1)) == 0.0:
        return mean, mean, mean
    interval = ttest_1samp(values, 0.0).confidence_interval(2.0 * confidence - 1.0)
    return mean, float(interval.low), float(interval.high)


def _cut_share(row: PromptReward) -> float:
    return row.truncated / len(row.rewards)
