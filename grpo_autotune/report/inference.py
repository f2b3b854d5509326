"""The summary of completions: each reward over all of them and over each branch."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from grpo_autotune.records.evaluations import half_interval
from grpo_autotune.records.trained import TOTAL, Completion, Inference, Score, Settings

CONFIDENCE = 0.95


def summarize(
    completions: Sequence[Completion], settings: Settings, *, out: str, written: int, tokens_per_s: float | None
) -> Inference:
    """The summary of a file that holds `completions`, of which this call has written some."""
    branches = dict.fromkeys(one.branch for one in completions if one.branch is not None)
    return Inference(
        out=out,
        settings=settings,
        confidence=CONFIDENCE,
        prompts=len({one.row for one in completions}),
        completions=len(completions),
        truncated=_mean(completions, "truncated"),
        tokens=_mean(completions, "tokens"),
        written=written,
        tokens_per_s=tokens_per_s,
        scores=[score for branch in (None, *sorted(branches)) for score in _scores(completions, branch)],
    )


def _scores(completions: Sequence[Completion], branch: str | None) -> Iterator[Score]:
    part = [one for one in completions if branch in (None, one.branch)]
    for name in (*part[0].rewards, TOTAL) if part and part[0].rewards else ():
        by_row = defaultdict[int, list[float]](list)
        for one in part:
            value = one.total if name == TOTAL else one.rewards[name]
            if value is not None:
                by_row[one.row].append(value)
        means = [float(np.mean(values)) for values in by_row.values()]
        mean, half = float(np.mean(means)) if means else None, half_interval(means, CONFIDENCE)
        ends = (None, None) if mean is None or math.isnan(half) else (mean - half, mean + half)
        yield Score(
            branch=branch,
            reward=name,
            mean=mean,
            low=ends[0],
            high=ends[1],
            prompts=len(by_row),
            completions=sum(map(len, by_row.values())),
            failed=sum(bool(one.failed) if name == TOTAL else name in one.failed for one in part),
            truncated=_mean(part, "truncated"),
        )


def _mean(completions: Sequence[Completion], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in completions]))
