"""Ranks against each other: who works longer than the others, so that they wait."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from grpo_autotune.records.probe import RankTimings


class Excess(NamedTuple):
    """Seconds per step by which a rank works longer than the mean of the others, the stage with most of it, and how
    much longer each of them waits."""

    rank: int
    extra_s: float
    stage: str
    stage_s: float
    others_wait_s: float


def excesses(rows: Sequence[RankTimings]) -> list[Excess]:
    """Each rank's excess, largest first; a rank's work is its step less `sync_wait`. Empty for fewer than two ranks."""
    longer = []
    for row in rows:
        others = [other for other in rows if other.rank != row.rank]
        stages = [stage for stage in row.stages if stage != "sync_wait"]
        if not others or not stages:
            continue
        extra = {s: row.stages[s] - statistics.fmean(other.stages.get(s, 0.0) for other in others) for s in stages}
        stage = max(extra, key=lambda name: extra[name])
        waits = statistics.fmean(other.stages.get("sync_wait", 0.0) for other in others)
        waits -= row.stages.get("sync_wait", 0.0)
        longer.append(Excess(row.rank, math.fsum(extra.values()), stage, extra[stage], max(0.0, waits)))
    return sorted(longer, key=lambda excess: -excess.extra_s)
