"""The objective of a search: useful completions per second, each figure with its interval.

A group of G completions holds G - 1 degrees of freedom after its mean is taken out, and none where all rewards are
equal. So a step is worth the sum over its groups of (G - 1) x [rewards differ], less truncated completions where the
loss masks them. With the learning knobs fixed this is 1 / seconds per step up to a constant.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln
from scipy.stats import betabinom, bootstrap

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.records.probe import ProbeRecord, TokenFacts, cycle_means

RESAMPLES = 2000
LIVING_RESAMPLES = 200
"""Of the probe's groups; each is fitted anew, a few milliseconds."""
MOST_PRECISION = 200.0
"""Upper bound of a + b in the fit: with few groups the likelihood may grow without bound as prompts become alike."""


class Interval(NamedTuple):
    """A value with the two ends of its interval."""

    value: float  # a median, another estimate, or a prediction
    low: float  # the value itself where one observation is all there is
    high: float
    n: int = 0  # observations it rests on; 0 for a prediction

    def over(self, other: "Interval") -> "Interval":
        """The ratio to another of equal meaning."""
        return Interval(self.value / other.value, self.low / other.high, self.high / other.low, min(self.n, other.n))

    def times(self, factor: float) -> "Interval":
        """The interval of something that is `factor` times as large."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.n)

    def differs(self, least: float) -> bool:
        """True where a ratio is further from 1 than by the part `least`."""
        return abs(math.log(self.value)) > math.log(1.0 + least)

    def is_apart(self, least: float) -> bool:
        """True where a ratio `differs`, and its interval does not hold 1."""
        return (self.low > 1.0 or self.high < 1.0) and self.differs(least)


class Living(NamedTuple):
    """Share of groups whose rewards differ, as a function of their size."""

    # parameters of the beta distribution of pass rates over prompts; None where rewards are not pass or fail, and the
    # share is `seen` whatever the size
    a: float | None
    b: float | None
    power: float  # the other rewards' part: dead share = (dead share by the first reward) ** power
    seen: float  # share of the probe's groups that lived
    groups: int  # groups it rests on

    def share(self, size: int) -> float:
        """Expected share of living groups among groups of `size`."""
        if self.a is None or self.b is None:
            return self.seen
        none, all_pass = np.exp(betaln([self.a, size + self.a], [size + self.b, self.b]) - betaln(self.a, self.b))
        dead = float(none + all_pass)  # the ends of `betabinom.pmf`, whose call takes a hundred times as long
        return float(1.0 - dead**self.power)


def median_interval(numbers: Sequence[float], confidence: float) -> Interval:
    """Median with its bootstrap interval (percentile method)."""
    if not numbers:
        raise ValueError("no numbers")
    middle = statistics.median(numbers)
    if len(numbers) < 2:
        return Interval(middle, middle, middle, len(numbers))
    ends = bootstrap(
        (np.asarray(numbers, dtype=float),),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(middle, float(ends.low), float(ends.high), len(numbers))


def step_interval(step_s: Sequence[float], cycle: int, confidence: float) -> Interval:
    """Seconds of an optimizer step; where generating steps take turns with others, of a whole cycle's mean."""
    return median_interval(cycle_means(step_s, cycle), confidence)


def living_of(record: ProbeRecord) -> Living | None:
    """Pool the probe's groups; None where no rewards were seen, or no group had any spread."""
    tokens = record.tokens
    if tokens is None or not tokens.groups or tokens.dead_groups >= tokens.groups:
        return None
    return _fit(tokens, record.trainer.num_generations, np.arange(len(tokens.pass_rates)))


def living_ratio(record: ProbeRecord, before: int, after: int, confidence: float) -> Interval | None:
    """Share of living groups of size `after` over that of size `before`, with its bootstrap interval over groups."""
    living, tokens = living_of(record), record.tokens
    if living is None or tokens is None:
        return None
    value = living.share(after) / living.share(before)
    if living.a is None:
        return Interval(value, value, value, living.groups)
    rng, count, size = np.random.default_rng(0), len(tokens.pass_rates), record.trainer.num_generations
    fits = (_fit(tokens, size, rng.integers(0, count, count)) for _ in range(LIVING_RESAMPLES))
    ratios = [fit.share(after) / fit.share(before) for fit in fits if fit.a is not None]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(ratios or [value], [tail, 100.0 - tail])
    return Interval(value, float(low), float(high), living.groups)


def useful_per_step(config: RunConfig, living: Living | None, truncated_share: float) -> float:
    """Useful completions per optimizer step; with unknown rewards every group counts as living."""
    size = config.batch.num_generations
    masked = masked_share(config, truncated_share)
    return useful_completions(groups_per_step(config), size, 1.0 if living is None else living.share(size), masked)


def masked_share(config: RunConfig, truncated_share: float) -> float:
    """Share of completions that the loss leaves out because they were cut off."""
    return truncated_share if config.grpo.get("mask_truncated_completions") else 0.0


def useful_completions(groups: float, size: int, living_share: float, masked_share: float) -> float:
    """Useful completions among groups of `size`, of which a share lives and a share of completions is masked."""
    return groups * living_share * max(0.0, size * (1.0 - masked_share) - 1.0)


def groups_per_step(config: RunConfig) -> float:
    """Groups generated per optimizer step, over all devices."""
    plan = config.batch
    return plan.completions_per_step / (plan.num_iterations * plan.num_generations)


def steps_between(
    config: RunConfig, name: Literal["evaluate", "save"], rows: int | None = None, steps: int = 0
) -> int | None:
    """Optimizer steps between two evaluations or checkpoints of a run of `steps` over `rows`; None where there are
    none, or nobody tells. The best model is saved after an evaluation at most."""
    kind = "eval" if name == "evaluate" else name
    strategy, every = grpo_value(f"{kind}_strategy", config), grpo_value(f"{kind}_steps", config)
    if strategy == "best":
        return steps_between(config, "evaluate", rows, steps)
    if strategy == "epoch" and rows is not None:
        return steps_per_pass(config, rows)
    every = every or (grpo_value("logging_steps", config) if name == "evaluate" else 0)
    return math.ceil(every if every >= 1 else every * steps) or None if strategy == "steps" else None


def occasions_of(config: RunConfig, name: Literal["evaluate", "save"], every: int, steps: int) -> int:
    """Evaluations or checkpoints of a run of `steps`: every so many steps and at its end, evaluations from the end of
    the delay on (transformers, `DefaultFlowCallback`) and once before training where that is asked for; 0 for never."""
    if name == "save" or every == 0:
        return math.ceil(steps / every) if every else 0
    delay = grpo_value("eval_delay", config) or 0
    delay *= every if grpo_value("eval_strategy", config) == "epoch" else 1
    often = math.ceil(steps / every) - max(0, math.ceil(delay / every) - 1) if delay <= steps else 0
    return often + bool(grpo_value("eval_on_start", config))


def steps_per_pass(config: RunConfig, rows: int) -> int:
    """Optimizer steps of a pass over the data; prompts that fill no generation are left out (TRL's sampler)."""
    plan = config.batch
    micro_steps = rows // plan.prompts_per_generation * plan.num_iterations * plan.steps_per_generation
    return max(1, math.ceil(micro_steps / plan.accumulation))


def run_steps(config: RunConfig, rows: int | None) -> int | None:
    """Optimizer steps of the run as it is configured; None where nobody knows how many rows a pass has."""
    if (steps := int(grpo_value("max_steps", config))) > 0:
        return steps
    passes = float(grpo_value("num_train_epochs", config))
    return None if rows is None else max(1, math.ceil(passes * steps_per_pass(config, rows)))


def run_ratio(config: RunConfig, own: RunConfig, step_ratio: float) -> float:
    """Wall time of the configured run over that of `own`, given the ratio of their seconds per step. `max_steps` fixes
    the number of steps; without it a run is so many passes over the prompts, and TRL's sampler repeats each prompt
    `num_generations * num_iterations` times (trl/trainer/grpo_trainer.py, `_get_train_sampler`)."""
    if int(own.grpo.get("max_steps", -1)) > 0:
        return step_ratio
    return step_ratio * groups_per_step(own) / groups_per_step(config)


def _fit(tokens: TokenFacts, size: int, chosen: np.ndarray) -> Living:
    """Beta-binomial pass counts by maximum likelihood, on the chosen groups."""
    counts = np.rint(np.asarray(tokens.pass_rates)[chosen] * size)
    seen = 1.0 - tokens.dead_groups / tokens.groups
    if not counts.size or not np.any((counts > 0) & (counts < size)):
        return Living(None, None, 1.0, seen, tokens.groups)

    def loss(theta: np.ndarray) -> float:
        a, b = _shape(theta)
        return -float(np.sum(betabinom.logpmf(counts, size, a, b)))

    mean = float(np.clip(counts.mean() / size, 0.02, 0.98))
    start = np.array([math.log(mean / (1.0 - mean)), math.log(2.0)])
    bounds = [(-6.0, 6.0), (math.log(0.05), math.log(MOST_PRECISION))]
    a, b = _shape(minimize(loss, start, method="L-BFGS-B", bounds=bounds).x)
    alike = float(np.mean((counts == 0) | (counts == size)))
    return Living(a, b, _power(alike, tokens, size), seen, tokens.groups)


def _shape(theta: np.ndarray) -> tuple[float, float]:
    mean, precision = 1.0 / (1.0 + math.exp(-float(theta[0]))), math.exp(float(theta[1]))
    return mean * precision, (1.0 - mean) * precision


def _power(alike: float, tokens: TokenFacts, size: int) -> float:
    """Exponent that leads from the share of groups alike in the first reward to the share that is dead; at least 1,
    since another reward can only bring groups to life."""
    passes = np.rint(np.asarray(tokens.pass_rates) * size)
    all_alike = int(np.sum((passes == 0) | (passes == size)))
    if not 0.0 < alike < 1.0 or tokens.dead_groups >= all_alike:
        return 1.0
    dead = alike * max(tokens.dead_groups, 0.5) / all_alike
    return min(10.0, math.log(dead) / math.log(alike))
