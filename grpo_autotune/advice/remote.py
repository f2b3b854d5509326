"""Advice and warnings on rewards over a network, from the seconds of their calls."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_autotune.advice.facts import Facts, Idea
from grpo_autotune.advice.neighbours import Neighbour
from grpo_autotune.predict.calls import batch_s
from grpo_autotune.records.report import Change
from grpo_autotune.units import listing, percent, seconds

LARGE_SHARE = 0.05
"""Of the step that waits, or of rows that the cache knew or that got no score: from here on it is worth a word."""
OVERLAP = "reward_overlap"


def more_at_once(facts: Facts, near: Neighbour) -> str:
    """A batch of calls now, and with the number at once that is advised."""
    ((key, lanes),) = near.knobs.items()
    one = next(calls for calls in facts.record.remote if calls.place == int(key.split(".")[1]))
    p95 = seconds(one.call_s.p95 if one.call_s else 0.0)
    after = seconds(batch_s(one, max(1, lanes // near.config.batch.processes)))
    return (
        f"{one.name} takes {p95} per call at p95, and {seconds(batch_s(one))} for a batch with {one.concurrency} at "
        f"once; with {lanes} at once {after} are predicted, if the endpoint bears so many"
    )


def slow_reward(facts: Facts) -> Idea | None:
    """A reward over a network that the step waits for: put beside log-probs, where there are any, else answered sooner.

    Where more calls at once would make it a tenth shorter, the knob's advice says so.
    """
    record, waited_s = facts.record, facts.breakdown.seconds("reward")
    one = max(record.remote, key=batch_s, default=None)
    if one is None or one.call_s is None or waited_s < LARGE_SHARE * facts.breakdown.step_s:
        return None
    told = f"{one.name} takes {seconds(one.call_s.p95)} per call at p95, and the step waits {seconds(waited_s)} for it"
    asked = facts.config.speedups if facts.config is not None else "none"
    beside_s = facts.part_s("policy_logprob", "old_policy") + facts.breakdown.seconds("reference_logprob")
    if beside_s and OVERLAP not in record.trainer.speedups and asked != "auto":
        after = [*(asked if isinstance(asked, list) else ()), OVERLAP]
        return Idea(
            kind="exact",
            stages=("reward",),
            changes=(Change(key="speedups", before=asked, after=after),),
            action="" if facts.config else f"call grpo_autotune.speed_up(trainer, {after}) before trainer.train()",
            saving_s=min(waited_s, beside_s),
            because=f"{told}; it can run beside {seconds(beside_s)} of log-probs",
        )
    if batch_s(one, one.calls) < 0.9 * batch_s(one) and not one.rate_limited:
        return None
    refused = f", {one.rate_limited} times by an answer of status 429" if one.rate_limited else ""
    return Idea(
        kind="exact",
        stages=("reward",),
        action=f"make {one.name} answer sooner, or give it another endpoint",
        saving_s=min(waited_s, one.batch_s / len(record.timings.steps) / 2.0),
        because=f"{told}{refused}. Predicted for half the seconds per batch",
    )


def remote_warnings(facts: Facts) -> Iterator[str]:
    """Rows that a cache knew, as new completions will not be, and rows without a score."""
    for one in facts.record.remote:
        failed = sum(one.failures.values())
        if one.cache_hits > LARGE_SHARE * one.rows:
            cold = f": without, {seconds(batch_s(one, rows=one.rows / one.batches))} per batch are predicted"
            told = f"{percent(one.cache_hits / one.rows)} of the rows of {one.name} came from its cache"
            yield f"{told}{cold if one.call_s else ''}."
        if failed > LARGE_SHARE * one.rows:
            kinds = listing([f"{kind} {count}" for kind, count in one.failures.items()])
            yield f"{percent(failed / one.rows)} of the rows of {one.name} got no score ({kinds})."


RULES = (slow_reward,)
