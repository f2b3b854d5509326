"""Advice and warnings on rewards over a network, from the seconds of their calls."""

from collections.abc import Iterator

from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.advice.neighbours import Neighbour
from grpo_autotune.predict.calls import batch_s
from grpo_autotune.units import listing, percent, seconds

LARGE_SHARE = 0.05
"""Of the step that waits, or of rows that the cache knew or that got no score: from here on it is worth a word."""


def more_at_once(facts: Facts, near: Neighbour) -> str:
    """A batch of calls now, and with the number at once that is advised."""
    ((key, lanes),) = near.knobs.items()
    one = next(calls for calls in facts.record.remote if calls.place == int(key.split(".")[1]))
    told = f"{one.name} takes {seconds(one.call_s.p95 if one.call_s else 0.0)} per call at p95, and a batch "
    after_s = batch_s(one, max(1, lanes // near.config.batch.processes))
    told += f"{seconds(batch_s(one))} with {one.concurrency} at once; with {lanes} at once {seconds(after_s)} are "
    return f"{told}predicted, if the endpoint bears so many"


def slow_reward(facts: Facts) -> Idea | None:
    """A reward over a network that the step waits for, and that more calls at once would not make a tenth shorter."""
    record, waited_s = facts.record, facts.breakdown.seconds("reward")
    one = max(record.remote, key=batch_s, default=None)
    if one is None or one.call_s is None or waited_s < LARGE_SHARE * facts.breakdown.step_s:
        return None
    if batch_s(one, one.calls) < 0.9 * batch_s(one) and not one.rate_limited:
        return None  # the knob's advice says so
    passes_s = facts.part_s("policy_logprob", "old_policy") + facts.breakdown.seconds("reference_logprob")
    hides = passes_s and "reward_overlap" not in record.trainer.speedups
    return Idea(
        kind="exact",
        stages=("reward",),
        action=f"make {one.name} answer sooner, or give it another endpoint",
        saving_s=min(waited_s, one.batch_s / len(record.timings.steps) / 2.0),
        because=f"It takes {seconds(one.call_s.p95)} per call at p95, and the step waits {seconds(waited_s)} for it"
        + (f"; {one.rate_limited} answers had status 429" if one.rate_limited else "")
        + ". Predicted for half the seconds per batch",
        caveat=f"The speed-up reward_overlap can hide it behind {seconds(passes_s)} of log-probs" if hides else "",
    )


def remote_warnings(facts: Facts) -> Iterator[str]:
    """Rows that a cache knew, as new completions will not be, and rows without a score."""
    for one in facts.record.remote:
        if one.cache_hits > LARGE_SHARE * one.rows:
            cold = f": without, {seconds(batch_s(one, rows=one.rows / one.batches))} per batch are predicted"
            told = f"{percent(one.cache_hits / one.rows)} of the rows of {one.name} came from its cache"
            yield f"{told}{cold if one.call_s else ''}."
        if (failed := sum(one.failures.values())) > LARGE_SHARE * one.rows:
            kinds = listing([f"{kind} {count}" for kind, count in one.failures.items()])
            yield f"{percent(failed / one.rows)} of the rows of {one.name} got no score ({kinds})."
