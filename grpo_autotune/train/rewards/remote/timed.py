"""Rewards that wait, timed: what all of them share, and a user's own async function, which scores a whole batch."""

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from grpo_autotune.console import warn
from grpo_autotune.errors import AutotuneError
from grpo_autotune.records.rewards import CallTimes, RemoteCalls
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.replies import excerpt

LEAST_DEADLINE_S, DEADLINE_P99 = 120.0, 5.0
"""A batch's deadline where none is given: so many times the 99th percentile of those before, and not less."""

NEWEST = 4096
"""Times that quantiles are taken over."""

WHOLE = [name for name, field in RemoteCalls.model_fields.items() if field.annotation is int]


class Remote:
    """Base of rewards that wait on a network, and what their functions carry as `remote`.

    Attributes:
        kind: `judge`, `service`, or `async` for a user's own function.
        count: The whole numbers of `RemoteCalls` since `reset`, by name."""

    kind = "async"

    def __init__(self) -> None:
        self.set_up(self.kind, "rewards")
        self.first_call_s: float | None = None
        self.took_s = deque[float](maxlen=100)  # of batches that ended before their deadline
        self._told, self._under_way, self._since_s = set[str](), 0, 0.0
        self.reset()

    def set_up(self, name: str, where: str, concurrency: int | None = None, deadline_s: float | None = None) -> None:
        """Take name and key path of the reward, and the keys that stand beside `params`."""
        self.name, self.where, self.concurrency, self.deadline_s = name, where, concurrency, deadline_s

    def reset(self) -> None:
        """Begin to count anew."""
        self.count, self.failures, self.providers = Counter[str](), Counter[str](), Counter[str]()
        self.seconds: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=NEWEST))
        self.batch_s, self.cost = 0.0, None

    def calls(self) -> RemoteCalls:
        """Calls since `reset`."""
        return RemoteCalls(
            **{name: self.count[name] for name in WHOLE},
            **{name: _quantiles(self.seconds[name]) for name in ("wait_s", "call_s", "retry_s")},
            **{name: getattr(self, name) for name in ("name", "kind", "first_call_s", "batch_s", "cost")},
            failures=dict(self.failures),
            providers=dict(self.providers),
            concurrency=self.limit(),
        )

    async def warm_up(self, batch: Mapping[str, Any]) -> None:
        """Make first calls, where these are known to change nothing."""

    def limit(self) -> int | None:
        """Calls at once that are allowed."""
        return None

    def batch_limit_s(self) -> float:
        """Longest that the next batch may take."""
        own_s = DEADLINE_P99 * float(np.percentile(self.took_s, 99)) if self.took_s else 0.0
        return self.deadline_s or max(LEAST_DEADLINE_S, own_s)

    @contextmanager
    def batch(self, rows: int) -> Iterator[None]:
        """A batch is under way."""
        self.count.update(batches=1, rows=rows)
        self._since_s = self._since_s if self._under_way else time.monotonic()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self.batch_s += 0.0 if self._under_way else time.monotonic() - self._since_s

    def called(self, seconds: float) -> None:
        """A request has ended."""
        self.seconds["call_s"].append(seconds)
        self.first_call_s = seconds if self.first_call_s is None else self.first_call_s

    def failed(self, kinds: Counter[str], rows: int, said: str = "") -> None:
        """Count the failures of a batch by kind, and tell of kinds that are new."""
        self.failures += kinds
        if not kinds.keys() <= self._told:
            self._told |= kinds.keys()
            listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            warn(
                f"reward {self.name}: {kinds.total()} of {rows} scores failed ({listed}){said and f': {said}'}; "
                f"further ones of this kind are only counted, in rewards/{self.name}/failed"
            )


class OwnReward(Remote):
    """A user's function. Where it `may_fail`, it has a deadline, and an error of its is no end of the run."""

    def __init__(self, function: Callable[..., Any], *, may_fail: bool) -> None:
        super().__init__()
        self._function, self._may_fail = function, may_fail

    async def __call__(self, **batch: Any) -> Any:
        """The function's own result, or `FAILED` for each row."""
        rows, begin_s = len(batch["completions"]), time.monotonic()
        self.count["calls"] += 1
        with self.batch(rows):
            try:
                async with asyncio.timeout(self.batch_limit_s() if self._may_fail else None) as limit:
                    values = await self._function(**batch)
                self.took_s.append(time.monotonic() - begin_s)
                return values
            except Exception as error:
                if not self._may_fail or isinstance(error, AutotuneError):
                    raise
                self.failed(
                    Counter({"deadline" if limit.expired() else type(error).__name__: rows}), rows, excerpt(str(error))
                )
                return [FAILED] * rows
            finally:
                self.called(time.monotonic() - begin_s)


def _quantiles(seconds: deque[float]) -> CallTimes | None:
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(list(seconds), (50, 95, 99)).tolist()
    return CallTimes(p50=p50, p95=p95, p99=p99)
