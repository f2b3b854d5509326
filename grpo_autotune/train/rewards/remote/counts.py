"""The part that all rewards over a network share: counts and times of their calls, and the deadline of a batch."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_autotune.console import warn
from grpo_autotune.records.rewards import CallTimes, RemoteCalls
from grpo_autotune.train.rewards.remote.replies import Reply

LEAST_DEADLINE_S, DEADLINE_P99 = 120.0, 5.0
"""A batch's deadline where none is given: so many times the 99th percentile of those before, and not less."""


def _newest() -> deque[float]:
    return deque(maxlen=4096)


@dataclass
class Counts:
    """Since the last reset; the fields are those of `RemoteCalls`, times still one by one (the newest of them)."""

    batches: int = 0
    rows: int = 0
    calls: int = 0
    retries: int = 0
    rate_limited: int = 0
    fallbacks: int = 0
    cache_hits: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    providers: Counter[str] = field(default_factory=Counter)
    wait_s: deque[float] = field(default_factory=_newest)
    call_s: deque[float] = field(default_factory=_newest)
    retry_s: deque[float] = field(default_factory=_newest)
    batch_s: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None

    def scored(self, by: str, reply: Reply, *, is_first: bool) -> None:
        """A row has its score, by the first endpoint or by one that it fell back to."""
        self.providers[by] += 1
        self.fallbacks += not is_first
        self.tokens_in, self.tokens_out = self.tokens_in + reply.tokens_in, self.tokens_out + reply.tokens_out
        if reply.cost is not None:
            self.cost = (self.cost or 0.0) + reply.cost


class Remote:
    """Base of rewards over a network, and the value of the attribute `remote` that their functions carry.

    Attributes:
        kind: `judge`, `service`, or `async` for a user's own function.
    """

    kind = "async"

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.counts = clock, Counts()
        self.set_up(self.kind, "rewards")
        self._first_call_s: float | None = None
        self._took_s = deque[float](maxlen=100)
        self._told: set[str] = set()
        self._under_way, self._since_s = 0, 0.0

    def set_up(self, name: str, where: str, concurrency: int | None = None, deadline_s: float | None = None) -> None:
        """Take name and key path of the reward, and the keys that stand beside `params`."""
        self.name, self.where, self.concurrency, self.deadline_s = name, where, concurrency, deadline_s

    def calls(self) -> RemoteCalls:
        """Calls since `reset`."""
        counted: dict[str, Any] = vars(self.counts)
        times = {key: _quantiles(counted[key]) for key in ("wait_s", "call_s", "retry_s")}
        kinds = {key: dict(counted[key]) for key in ("failures", "providers")}
        own = {"name": self.name, "kind": self.kind, "first_call_s": self._first_call_s, "concurrency": self._limit()}
        return RemoteCalls(**{**counted, **times, **kinds, **own})

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts = Counts()

    async def warm_up(self, batch: Mapping[str, Any]) -> None:
        """Make first calls, where these are known to change nothing."""

    def _limit(self) -> int | None:
        """Calls at once that are allowed."""
        return None

    def _batch_limit_s(self) -> float:
        """The deadline of the next batch, from its begin."""
        own_s = DEADLINE_P99 * float(np.percentile(self._took_s, 99)) if self._took_s else 0.0
        return self.deadline_s or max(LEAST_DEADLINE_S, own_s)

    @contextmanager
    def _batch(self, rows: int) -> Iterator[None]:
        """A batch is under way."""
        self.counts.batches, self.counts.rows = self.counts.batches + 1, self.counts.rows + rows
        self._since_s = self._since_s if self._under_way else self.clock()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self.counts.batch_s += 0.0 if self._under_way else self.clock() - self._since_s

    def _called(self, seconds: float) -> None:
        """A request has ended."""
        self.counts.call_s.append(seconds)
        self._first_call_s = seconds if self._first_call_s is None else self._first_call_s

    def _failed(self, kinds: Counter[str], rows: int, said: str = "") -> None:
        """Count the failures of a batch by kind, and tell of kinds that are new."""
        self.counts.failures += kinds
        if not kinds.keys() <= self._told:
            self._told |= kinds.keys()
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            warn(
                f"reward {self.name}: {kinds.total()} of {rows} scores failed ({listed}){said and f': {said}'}; "
                f"further ones of this kind are only counted, in rewards/{self.name}/failed"
            )


def _quantiles(seconds: deque[float]) -> CallTimes | None:
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(list(seconds), (50, 95, 99)).tolist()
    return CallTimes(p50=p50, p95=p95, p99=p99)
