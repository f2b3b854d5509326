"""How many calls an endpoint gets: at once, a minute, and whether any. Times are seconds of the event loop's clock."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from grpo_autotune.train.rewards.remote.replies import Busy, Endpoint, Failed


@dataclass(frozen=True)
class Policy:
    """Numbers of retries, of adaptive concurrency (those of inspect_ai, "Adaptive connections"), and of the breaker."""

    tries: int = 4  # calls of a row at most
    call_s: float = 120.0  # from a row's first call, a pause before the next one included
    extra: float = 0.2  # retries of a batch as a share of its rows; what a batch leaves, a later one may use
    extra_least: int = 3  # retries that a small batch may make all the same, while earlier ones left so many
    wait_s: tuple[float, float] = (0.5, 20.0)  # bound of the first pause, doubled each time, and of any
    start: int = 20  # calls at once in the beginning, over all ranks; these three are divided among them
    least: int = 4
    most: int = 100
    cooldown_s: float = 15.0  # refusals within it count as one, and nothing grows
    in_a_row: int = 5  # failures that open the breaker, as does half of the last `window`
    window: int = 20
    open_s: float = 30.0  # until one call may try again


class Slots:
    """Calls at once: doubles after each clean round that used all of it, until the endpoint says that it is too much.

    From then on it grows by 5 %, and shrinks to 0.8 of it once for all refusals within the cooldown.
    """

    def __init__(self, fixed: int | None, ranks: int, policy: Policy, clock: Callable[[], float]) -> None:
        start, self._least, self._most = (fixed,) * 3 if fixed else (policy.start, policy.least, policy.most)
        self.limit, self._least, self._most = (max(1, calls // ranks) for calls in (start, self._least, self._most))
        self._free, self._debt = asyncio.Semaphore(self.limit), 0
        self._cooldown_s, self._clock = policy.cooldown_s, clock
        self._clean, self._is_full, self._growth, self._calm_s = 0, False, 2.0, 0.0

    async def __aenter__(self) -> None:
        self._is_full = self._is_full or self._free.locked()
        await self._free.acquire()

    async def __aexit__(self, *error: object) -> None:
        self._give(1)

    def learn(self, error: Failed | None) -> None:
        """Adapt to the end of a call: None is a clean one; a failure of another kind than `Busy` stops growth only."""
        if isinstance(error, Busy):
            if self._clock() >= self._calm_s:
                self._set(int(self.limit * 0.8))
            self._growth = 1.05
            self._calm_s = max(self._calm_s, self._clock() + max(self._cooldown_s, error.retry_after_s or 0.0))
        self._clean = self._clean + 1 if error is None else 0
        if self._clean >= self.limit and self._is_full and self._clock() >= self._calm_s:
            self._set(max(self.limit + 1, int(self.limit * self._growth)))

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


class Pace:
    """At most so many calls in any minute, and none in a pause that the endpoint asked for."""

    def __init__(self, rpm: int | None, ranks: int, clock: Callable[[], float]) -> None:
        self._begun = deque[float](maxlen=max(1, rpm // ranks) if rpm else 0)
        self._clock, self._pause_s = clock, 0.0

    def pause(self, seconds: float) -> None:
        self._pause_s = max(self._pause_s, self._clock() + seconds)

    async def turn(self) -> None:
        """Wait until a call may be made, and count it."""
        while (rest_s := self._next_s() - self._clock()) > 0:
            await asyncio.sleep(rest_s)
        self._begun.append(self._clock())

    def _next_s(self) -> float:
        is_full = self._begun and len(self._begun) == self._begun.maxlen
        return max(self._pause_s, self._begun[0] + 60.0) if is_full else self._pause_s


class Breaker:
    """Keeps calls from an endpoint that fails: open for a while, then one call tries."""

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._ends = deque[bool](maxlen=policy.window)
        self._until_s: float | None = None  # None while closed
        self._is_tried = False

    def shut_s(self) -> float:
        """Seconds until it is worth asking again; 0 where a call may be made."""
        if self._until_s is None:
            return 0.0
        return self._policy.open_s / 100 if self._is_tried else max(0.0, self._until_s - self._clock())

    def begin(self) -> bool:
        """A call begins; True if it is the one that tries."""
        self._is_tried = self._until_s is not None
        return self._is_tried

    def end(self, good: bool | None, tried: bool) -> None:
        """A call has ended; None where that says nothing of the endpoint."""
        self._is_tried = self._is_tried and not tried
        if good is None:
            return
        self._ends.append(good)
        last, most = list(self._ends), self._policy.in_a_row
        bad_row = len(last) >= most and not any(last[-most:])
        if good:
            self._until_s = None
        elif tried or bad_row or (len(last) == self._policy.window and 2 * sum(last) <= len(last)):
            self.open(self._policy.open_s)

    def open(self, seconds: float) -> None:
        """Let no call through for so long."""
        self._until_s = max(self._until_s or 0.0, self._clock() + seconds)
        self._ends.clear()


class Lane:
    """An endpoint with its limits, on one event loop."""

    def __init__(
        self, endpoint: Endpoint, slots: Slots, ranks: int, policy: Policy, clock: Callable[[], float]
    ) -> None:
        self.endpoint, self.slots = endpoint, slots
        self.pace, self.breaker = Pace(endpoint.rpm, ranks, clock), Breaker(policy, clock)
        self.trouble: Failed | None = None  # the newest one
