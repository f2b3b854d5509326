"""A reward that asks endpoints for its scores: the rows of a batch side by side, under one deadline.

Retries are made here and nowhere else, by one rule for a row, one for a batch and one for an endpoint (see `Policy`).
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from grpo_autotune.config.batch import world_size
from grpo_autotune.errors import RewardError
from grpo_autotune.train.rewards.answers import completion_text
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.limits import Lane, Policy
from grpo_autotune.train.rewards.remote.replies import Endpoint, Failed, Refused, Reply, client
from grpo_autotune.train.rewards.remote.timed import Remote
from grpo_autotune.units import plural

REMEDIES = {
    400: "Check what is sent",
    401: "Check the key in the environment",
    403: "Check what the key in the environment may do",
    404: "Check the address, and the names in it and in params",
}

SILENT = ("connect", "deadline", "read", "timeout")
"""Kinds of failure in which an endpoint says nothing."""


class _Shut(Exception):
    """No endpoint will take a call before the batch's deadline; its argument is the kind of the newest failure."""


@dataclass
class _Asked:
    """A row that is asked for, and what came of it."""

    row: Any
    until_s: float = math.inf  # the batch's deadline
    score: float = FAILED
    by: str | None = None
    trouble: str = "deadline"
    calls: int = 0
    begin_s: float = 0.0  # of the first call
    end_s: float = 0.0
    last_s: float = 0.0  # begin of the newest


class RemoteReward(Remote):
    """Base of rewards that ask endpoints, in fall-back order; a subclass says what is asked.

    A subclass makes `endpoints` in its constructor, which takes the `params` of the configuration and no more, and
    defines `rows`. In a ConfigError that the constructor raises, `where` is the path inside `params`.

    Attributes:
        warmup: First rows of a process that are asked one after another, before the others.
        cache: What `known` looks into; None asks always.
        columns: Columns that `rows` needs: those that the data has not are told before training."""

    warmup = 1
    cache: Any = None

    def __init__(self, endpoints: Sequence[Endpoint], policy: Policy | None = None) -> None:
        super().__init__()
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
        """The requests, one for each completion of a batch, the keywords that TRL gives a reward function."""
        raise NotImplementedError

    def known(self, row: Any) -> float | None:
        """The score of a row that was asked for before. Called on the event loop: it must be quick."""
        return None

    async def __call__(self, **batch: Any) -> list[float]:
        """Scores of a batch, `FAILED` where there is none; RewardError where an endpoint refuses, or none has ever
        answered."""
        asked = [_Asked(row) for row in self.rows(batch)]
        with self.batch(len(asked)):
            for one in asked:
                if (score := self.known(one.row)) is not None:
                    one.score, one.by = score, "cache"
                    self.count["cache_hits"] += 1
            await self._ask([one for one in asked if one.by is None])
        self.failed(Counter(one.trouble for one in asked if one.score is FAILED), len(asked))
        if len(self.endpoints) > 1 and "log_extra" in batch:
            batch["log_extra"](f"{self.name}_provider", [one.by for one in asked])
        return [one.score for one in asked]

    async def warm_up(self, batch: Mapping[str, Any]) -> None:
        """Ask the first rows of a batch, one after another; their scores are dropped. RewardError where an endpoint
        refuses, or none says a word."""
        asked = [_Asked(row) for row in self.rows(batch)[: self.warmup]]
        await self._ask(asked)
        for lane in self._lanes[:1] if asked and not self._has_answered else ():
            trouble = lane.trouble or Failed("deadline", f"no answer within {self.batch_limit_s():g} s")
            if trouble.kind in SILENT:
                raise self._unanswered(lane, trouble)

    def limit(self) -> int | None:
        return self._lanes[0].limit if self._lanes else self.concurrency

    async def _ask(self, asked: list[_Asked]) -> None:
        """Ask for all of them until the deadline; then those under way are given up."""
        if self._client is not client():  # another process or event loop, or closed: what was learned belongs to it
            self._client, self._warmed = client(), 0
            self._lanes = [Lane(one, self.concurrency, world_size(), self.policy) for one in self.endpoints]
        extra, begin_s, limit_s = self.policy.extra * len(asked), time.monotonic(), self.batch_limit_s()
        self._credit = min(self._credit + extra, max(self.policy.extra_least, extra))
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for one in asked:
                    one.until_s = begin_s + limit_s
                    if self._warmed < self.warmup:
                        self._warmed += 1
                        await self._score(one, begin_s)
                    else:
                        group.create_task(self._score(one, begin_s))
        except TimeoutError:
            return
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self.took_s.append(time.monotonic() - begin_s)

    async def _score(self, one: _Asked, batch_begin_s: float) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            stop=lambda state: self._is_over(one, state.upcoming_sleep),
            wait=self._pause_s,
            sleep=asyncio.sleep,
            reraise=True,
        )
        reply: Reply
        try:
            reply, one.by = await retrying(self._attempt, one)
        except (Failed, _Shut) as error:
            one.trouble = error.args[0]
            return
        finally:
            if one.calls:
                self.seconds["wait_s"].append(one.begin_s - batch_begin_s)
            if one.calls > 1:
                self.seconds["retry_s"].append(one.last_s - one.end_s)
        one.score = reply.value
        self.providers[one.by] += 1
        fallbacks = int(one.by != self.endpoints[0].name)
        self.count.update(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out, fallbacks=fallbacks)
        self.cost = self.cost if reply.cost is None else (self.cost or 0.0) + reply.cost

    def _is_over(self, one: _Asked, pause_s: float) -> bool:
        """True if a row may have no further call; one that it may have is taken off what the batch has left."""
        is_late = time.monotonic() + pause_s - one.begin_s >= self.policy.call_s
        if one.calls >= self.policy.tries or is_late or self._credit < 1:
            return True
        self._credit -= 1
        return False

    def _pause_s(self, state: RetryCallState) -> float:
        """Full jitter, on top of what the endpoint asks for; a pause that opens the breaker is waited for there."""
        error, (first_s, most_s) = state.outcome and state.outcome.exception(), self.policy.wait_s
        asked_s = error.retry_after_s if isinstance(error, Failed) else 0.0
        jitter_s = random.uniform(0, min(most_s, first_s * 2 ** (state.attempt_number - 1)))
        return jitter_s + (asked_s if asked_s < self.policy.open_s else 0.0)

    async def _attempt(self, one: _Asked) -> tuple[Reply, str]:
        """One call, as soon as an endpoint takes it."""
        while True:
            shut_s = [lane.shut_s() for lane in self._lanes]
            lane = self._lanes[shut_s.index(min(shut_s))]
            if min(shut_s) and not self._has_answered and lane.trouble:
                raise self._unanswered(lane, lane.trouble)
            if min(shut_s):
                if lane.trouble and time.monotonic() + min(shut_s) >= one.until_s:
                    raise _Shut(lane.trouble.kind)
                await asyncio.sleep(min(shut_s))
                continue
            async with lane:
                if not lane.shut_s():  # it may have opened meanwhile
                    return await self._send(lane, one), lane.endpoint.name

    async def _send(self, lane: Lane, one: _Asked) -> Reply:
        one.calls, one.last_s = one.calls + 1, time.monotonic()
        one.begin_s = one.begin_s or one.last_s
        self.count.update(calls=1, retries=int(one.calls > 1))
        limit_s = min(lane.endpoint.timeout_s, one.begin_s + self.policy.call_s - one.last_s)
        tried = lane.begin()
        try:
            async with asyncio.timeout(limit_s):
                reply = await lane.endpoint.ask(one.row)
        except (Failed, TimeoutError) as raised:
            error = raised if isinstance(raised, Failed) else Failed("timeout", f"no answer within {limit_s:g} s")
            self.count["rate_limited"] += error.kind == "429"
            lane.end(error, tried)
            raise error from None
        except Refused as refused:
            told = f"{lane.endpoint.name} answered {refused.status}: {refused.said}"
            raise self._error(lane, told, REMEDIES.get(refused.status)) from None
        finally:
            end_s = time.monotonic()
            self.called(end_s - one.last_s)
            one.end_s = end_s if one.calls == 1 else one.end_s
            lane.leave(tried)
        lane.end(None, tried)
        self._has_answered = True
        return reply

    def _unanswered(self, lane: Lane, trouble: Failed) -> RewardError:
        told = f"{plural(self.count['calls'], 'call')} failed ({trouble.kind}: {trouble.said})"
        told = f"{lane.endpoint.name} has given no score yet, {told}"
        return self._error(lane, told, "Is it up, are its settings right?")

    def _error(self, lane: Lane, told: str, fix: str | None) -> RewardError:
        return RewardError(told, where=f"{self.where}.{lane.endpoint.where}", fix=fix)


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch: its columns, the text of the `prompt`'s last message, and that of the `completion`."""
    named = {key: values for key, values in batch.items() if isinstance(values, list)}
    named["prompt"] = [completion_text(turns if isinstance(turns, str) else turns[-1:]) for turns in batch["prompts"]]
    named["completion"] = [completion_text(turns) for turns in batch["completions"]]
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]
