"""A reward that asks endpoints for its scores: the rows of a batch side by side, under one deadline.

Retries are made here and nowhere else, by one rule for a row, one for a batch and one for an endpoint (see `Policy`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from grpo_autotune.config.batch import world_size
from grpo_autotune.errors import RewardError
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.client import client
from grpo_autotune.train.rewards.remote.counts import Remote
from grpo_autotune.train.rewards.remote.limits import Lane, Policy, Slots
from grpo_autotune.train.rewards.remote.replies import Busy, Endpoint, Failed, Refused, Reply

REMEDIES = {
    400: "Check what is sent",
    401: "Check the key in the environment",
    403: "Check what the key in the environment may do",
    404: "Check the address and the model's name",
}


class Cache(Protocol):
    """Scores of rows that were asked for before. Called on the event loop: both must be quick."""

    def get(self, row: Any, /) -> float | None: ...
    def put(self, row: Any, value: float, /) -> None: ...


@dataclass
class _Asked:
    """A row that is asked for: the times of its calls, and what came of it."""

    row: Any
    score: float = FAILED
    by: str | None = None
    trouble: str = "deadline"
    calls: int = 0
    first_s: tuple[float, float] = (0.0, 0.0)  # begin and end of the first call
    last_s: float = 0.0  # begin of the newest


class RemoteReward(Remote):
    """Base of rewards that ask endpoints, in fall-back order; a subclass says what is asked.

    A subclass makes `endpoints` in its constructor, which takes the `params` of the configuration and no more, and
    defines `rows`. In a ConfigError that the constructor raises, `where` is the path inside `params`.

    Attributes:
        warmup: First rows of a process that are asked one after another, before the others.
        cache: Scores known already; None asks always.
        columns: Columns that `rows` needs, beside `prompt` and `completion`: these are checked before training.
    """

    warmup = 1
    cache: Cache | None = None

    def __init__(
        self, endpoints: Sequence[Endpoint], policy: Policy | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self.endpoints, self.policy = endpoints, policy or Policy()
        self.columns: set[str] = set()
        self._lanes: list[Lane] = []
        self._client: httpx2.AsyncClient | None = None
        self._credit, self._warmed, self._has_answered = float(self.policy.extra_least), 0, False

    @property
    def http(self) -> httpx2.AsyncClient:
        """The client of this process and the running event loop; for `openai`: `http_client=self.http`."""
        return client()

    def rows(self, batch: Mapping[str, Any]) -> list[Any]:
        """What is asked for each completion of a batch, the keywords that TRL gives a reward function."""
        raise NotImplementedError

    async def __call__(self, **batch: Any) -> list[float]:
        """Scores of a batch, `FAILED` where there is none; RewardError where an endpoint refuses, or none has ever
        answered."""
        asked = [_Asked(row) for row in self.rows(batch)]
        with self._batch(len(asked)):
            await self._ask([one for one in asked if not self._is_known(one)])
        self._failed(Counter(one.trouble for one in asked if one.score is FAILED), len(asked))
        if len(self.endpoints) > 1 and "log_extra" in batch:
            batch["log_extra"](f"{self.name}_provider", [one.by for one in asked])
        return [one.score for one in asked]

    async def warm_up(self, batch: Mapping[str, Any]) -> None:
        """Ask the first rows of a batch, one after another; their scores are dropped."""
        await self._ask([_Asked(row) for row in self.rows(batch)[: self.warmup]])

    def _limit(self) -> int | None:
        return self._lanes[0].slots.limit if self._lanes else self.concurrency

    def _is_known(self, one: _Asked) -> bool:
        score = None if self.cache is None else self.cache.get(one.row)
        if score is not None:
            one.score, one.by = score, "cache"
            self.counts.cache_hits += 1
        return score is not None

    async def _ask(self, asked: list[_Asked]) -> None:
        """Ask for all of them until the deadline; then those under way are given up."""
        self._enter_loop()
        extra, begin_s = self.policy.extra * len(asked), self.clock()
        self._credit = min(self._credit + extra, max(self.policy.extra_least, extra))
        try:
            async with asyncio.timeout(self._batch_limit_s()), asyncio.TaskGroup() as group:
                for one in asked:
                    if self._warmed < self.warmup:
                        self._warmed += 1
                        await self._score(one, begin_s)
                    else:
                        group.create_task(self._score(one, begin_s))
        except TimeoutError:
            return
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self._took_s.append(self.clock() - begin_s)

    def _enter_loop(self) -> None:
        """Limits belong to the client, and so to an event loop and a process."""
        if self._client is not client():
            self._client, self._warmed = client(), 0
            limits = world_size(), self.policy, self.clock
            slots = [Slots(self.concurrency, *limits) for _ in self.endpoints]
            slots = slots[:1] * len(slots) if self.concurrency else slots
            self._lanes = [Lane(one, own, *limits) for one, own in zip(self.endpoints, slots, strict=True)]

    async def _score(self, one: _Asked, begin_s: float) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            stop=lambda state: self._is_over(one, state.upcoming_sleep),
            wait=self._pause_s,
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            reply, by = await retrying(self._attempt, one)
        except Failed as error:
            one.trouble = error.kind
            return
        finally:
            if one.calls:
                self.counts.wait_s.append(one.first_s[0] - begin_s)
            if one.calls > 1:
                self.counts.retry_s.append(one.last_s - one.first_s[1])
        one.score, one.by = reply.value, by
        self.counts.scored(by, reply, is_first=by == self.endpoints[0].name)
        if self.cache is not None:
            self.cache.put(one.row, reply.value)

    def _is_over(self, one: _Asked, pause_s: float) -> bool:
        """Whether a row may have no further call; one that it may have is taken off what the batch has left."""
        is_late = self.clock() + pause_s - one.first_s[0] >= self.policy.call_s
        if one.calls >= self.policy.tries or is_late or self._credit < 1:
            return True
        self._credit -= 1
        return False

    def _pause_s(self, state: RetryCallState) -> float:
        """Full jitter, on top of what the endpoint asks for; a long pause is the breaker's."""
        error = state.outcome.exception() if state.outcome else None
        asked_s = (error.retry_after_s if isinstance(error, Failed) else None) or 0.0
        first_s, most_s = self.policy.wait_s
        jitter_s = random.uniform(0, min(most_s, first_s * 2 ** (state.attempt_number - 1)))
        return jitter_s + (asked_s if asked_s < self.policy.open_s else 0.0)

    async def _attempt(self, one: _Asked) -> tuple[Reply, str]:
        """One call, as soon as an endpoint takes it."""
        while True:
            lane = await self._open_lane()
            async with lane.slots:
                await lane.pace.turn()
                if not lane.breaker.shut_s():
                    return await self._send(lane, one), lane.endpoint.name

    async def _open_lane(self) -> Lane:
        while True:
            shut_s = [lane.breaker.shut_s() for lane in self._lanes]
            if 0.0 in shut_s:
                return self._lanes[shut_s.index(0.0)]
            if not self._has_answered:
                raise self._never_answered()
            await asyncio.sleep(min(shut_s))

    async def _send(self, lane: Lane, one: _Asked) -> Reply:
        counts, begin_s, error, good = self.counts, self.clock(), None, None
        one.calls, one.last_s = one.calls + 1, begin_s
        counts.calls, counts.retries = counts.calls + 1, counts.retries + (one.calls > 1)
        if one.calls == 1:
            one.first_s = begin_s, begin_s
        left_s = self.policy.call_s - (begin_s - one.first_s[0])
        trial = lane.breaker.begin()
        try:
            async with asyncio.timeout(min(lane.endpoint.timeout_s, left_s)):
                reply = await lane.endpoint.ask(one.row)
            good = self._has_answered = True
            return reply
        except TimeoutError:
            error = Failed("timeout", f"no answer within {lane.endpoint.timeout_s:g} s")
            raise error from None
        except Failed as failed:
            error = failed
            raise
        except Refused as refused:
            raise RewardError(
                f"{lane.endpoint.name} answered {refused.status}: {refused.said}",
                where=f"{self.where}.{lane.endpoint.where}",
                fix=REMEDIES.get(refused.status),
            ) from None
        finally:
            end_s = self.clock()
            self._called(end_s - begin_s)
            one.first_s = (begin_s, end_s) if one.calls == 1 else one.first_s
            self._learn(lane, error, good, trial)

    def _learn(self, lane: Lane, error: Failed | None, good: bool | None, trial: bool) -> None:
        """What a call says of its endpoint; nothing where it was given up."""
        is_busy = isinstance(error, Busy)
        lane.trouble = error or lane.trouble
        lane.breaker.end(False if error and not is_busy else good, trial)
        if error or good:
            lane.slots.learn(error)
        self.counts.rate_limited += is_busy
        pause_s = (error.retry_after_s if error else None) or 0.0
        if is_busy and pause_s >= self.policy.open_s:
            lane.breaker.open(pause_s)
        elif is_busy:
            lane.pace.pause(pause_s)

    def _never_answered(self) -> RewardError:
        """The error of a process in which no call has succeeded yet: its configuration is wrong, most likely."""
        lane = self._lanes[0]
        kind, said = (lane.trouble.kind, lane.trouble.said) if lane.trouble else ("busy", "")
        told = f"{lane.endpoint.name} has given no score yet, {self.counts.calls} calls failed ({kind}: {said})"
        return RewardError(told, where=f"{self.where}.{lane.endpoint.where}", fix="Is it up, are its settings right?")
