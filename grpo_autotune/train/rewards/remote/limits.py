"""Limits of the calls to an endpoint: at once, in a minute, and none while it fails."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from grpo_autotune.train.rewards.remote.replies import Busy, Endpoint, Failed, Unfit


@dataclass(frozen=True)
class Policy:
    """Numbers of retries, of adaptive concurrency (inspect_ai's, "Adaptive connections"), and of the breaker."""

    tries: int = 4  # calls of a row at most
    call_s: float = 120.0  # from a row's first call on, pauses included
    extra: float = 0.2  # retries of a batch, as a share of its rows
    extra_least: int = 3  # retries that a small batch may make all the same, while those before it left so many
    wait_s: tuple[float, float] = (0.5, 20.0)  # bound of the first pause, doubled each time, and of any
    start: int = 20  # calls at once in the beginning, over all ranks
    least: int = 4
    most: int = 100
    cooldown_s: float = 15.0  # refusals within it count as one, and nothing grows
    in_a_row: int = 5  # failures that open the breaker, as does half of the last `window`
    window: int = 20
    open_s: float = 30.0  # until one call may try again


class Lane:
    """An endpoint and its limits, on one event loop.

    Calls at once double after each clean round that used all of `limit`, until the endpoint says that it is too much;
    from then on they grow by 5 %, and shrink to 0.8 once for all refusals within the cooldown."""

    def __init__(
        self,
        endpoint: Endpoint,
        fixed: int | None,
        ranks: int,
        policy: Policy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint, self._policy, self._clock = endpoint, policy, clock
        sizes = (fixed,) * 3 if fixed else (policy.start, policy.least, policy.most)
        self.limit, self._least, self._most = (max(1, size // ranks) for size in sizes)
        self._free, self._debt = asyncio.Semaphore(self.limit), 0
        self._clean, self._is_full, self._growth, self._calm_s = 0, False, 2.0, 0.0
        self._begun = deque[float](maxlen=max(1, endpoint.rpm // ranks) if endpoint.rpm else 0)
        self._pause_s = 0.0
        self._ends = deque[bool](maxlen=policy.window)
        self._shut_s: float | None = None  # until when the breaker is open, None while it is closed
        self._is_tried = False
        self.trouble: Failed | None = None  # the newest one

    async def __aenter__(self) -> None:
        """Wait for one of the calls at once, and for the minute's limit or a pause that the endpoint asked for."""
        self._is_full = self._is_full or self._free.locked()
        await self._free.acquire()
        try:
            while (rest_s := self._next_s() - self._clock()) > 0:
                await asyncio.sleep(rest_s)
        except BaseException:
            self._give(1)
            raise
        self._begun.append(self._clock())

    async def __aexit__(self, *error: object) -> None:
        self._give(1)

    def shut_s(self) -> float:
        """Seconds until it is worth asking again; 0 where the breaker lets a call through."""
        if self._shut_s is None:
            return 0.0
        return self._policy.open_s / 100 if self._is_tried else max(0.0, self._shut_s - self._clock())

    def begin(self) -> bool:
        """A call begins; True if it is the one that tries."""
        self._is_tried = self._shut_s is not None
        return self._is_tried

    def end(self, error: Failed | None, tried: bool) -> None:
        """Learn from a call: None is a good answer."""
        self.trouble = error or self.trouble
        if isinstance(error, Busy):
            self._slow_down(error.retry_after_s)
            return
        is_good, asked_s = error is None or isinstance(error, Unfit), error.retry_after_s if error else 0.0
        self._ends.append(is_good)
        last, most = list(self._ends), self._policy.in_a_row
        half = len(last) == self._policy.window and 2 * sum(last) <= len(last)
        if is_good:
            self._shut_s = None
        elif asked_s >= self._policy.open_s or tried or half or (len(last) >= most and not any(last[-most:])):
            self._open(max(self._policy.open_s, asked_s))
        self._clean = self._clean + 1 if is_good else 0
        if self._clean >= self.limit and self._is_full and self._clock() >= self._calm_s:
            self._set(max(self.limit + 1, int(self.limit * self._growth)))

    def leave(self, tried: bool) -> None:
        """A call is over, however it ended."""
        self._is_tried = self._is_tried and not tried

    def _slow_down(self, pause_s: float) -> None:
        now_s = self._clock()
        if now_s >= self._calm_s:
            self._set(int(self.limit * 0.8))
        self._growth, self._calm_s = 1.05, max(self._calm_s, now_s + max(self._policy.cooldown_s, pause_s))
        if pause_s < self._policy.open_s:
            self._pause_s = max(self._pause_s, now_s + pause_s)
        else:
            self._open(pause_s)

    def _open(self, seconds: float) -> None:
        self._shut_s = max(self._shut_s or 0.0, self._clock() + seconds)
        self._ends.clear()

    def _next_s(self) -> float:
        is_full = self._begun and len(self._begun) == self._begun.maxlen
        return max(self._pause_s, self._begun[0] + 60.0) if is_full else self._pause_s

    def _set(self, limit: int) -> None:
        limit = min(max(limit, self._least), self._most)
        self._clean, self._is_full = 0, False
        grown, self.limit = limit - self.limit, limit
        self._debt -= min(grown, 0)
        self._give(grown)

    def _give(self, permits: int) -> None:
        for _ in range(permits):
            if self._debt:
                self._debt -= 1
            else:
                self._free.release()
