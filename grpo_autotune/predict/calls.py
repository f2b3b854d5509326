"""Seconds of a batch of calls over a network at other numbers of them at once, from the calls that were measured.

It is assumed that a call takes as long with more of them at once, which an endpoint at its limit does not keep.
"""

import heapq
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.records.rewards import CallTimes, RemoteCalls


@lru_cache(maxsize=4096)
def scheduled_s(times: CallTimes, calls: int, lanes: int) -> float:
    """Seconds until so many calls have ended, each begun where a lane is free (list scheduling, Graham 1969); lengths
    are log-normal between the percentiles, mirrored below the median, in an order drawn once."""
    p50, p95, p99 = np.log([max(value, 1e-6) for value in (times.p50, times.p95, times.p99)])
    normal = ndtri((np.arange(calls) + 0.5) / calls)
    lengths = np.exp(np.interp(normal, ndtri([0.05, 0.5, 0.95, 0.99]), [2.0 * p50 - p95, p50, p95, p99])).tolist()
    random.Random(0).shuffle(lengths)
    free = [0.0] * max(1, min(lanes, calls))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def batch_s(remote: RemoteCalls, lanes: int | None = None, rows: float | None = None) -> float:
    """Seconds of a batch of so many rows with so many calls at once on this rank (None: as measured), in proportion to
    the measured ones: those hold retries and what else no schedule tells."""
    if remote.call_s is None or not remote.batches:
        return 0.0
    count = max(1, round(remote.calls / remote.batches))
    asked = count if rows is None else max(1, round(rows * remote.calls / max(1, remote.rows - remote.cache_hits)))
    now = remote.concurrency or count
    longer = scheduled_s(remote.call_s, asked, lanes or now) / scheduled_s(remote.call_s, count, now)
    return remote.batch_s / remote.batches * longer


def longest_s(remote: Sequence[RemoteCalls], config: RunConfig) -> float:
    """Seconds of a generation's calls under a configuration: all rewards ask at the same time."""
    lanes = [(one, config.rewards[one.place].concurrency) for one in remote if one.place < len(config.rewards)]
    return max((batch_s(one, n and max(1, n // config.batch.processes)) for one, n in lanes), default=0.0)
