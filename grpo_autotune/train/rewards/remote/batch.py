"""A reward that asks endpoints for its scores: a batch of rows under one deadline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx2

from grpo_autotune.records.rewards import RemoteCalls
from grpo_autotune.train.rewards.remote.replies import Endpoint


class Cache(Protocol):
    """Scores of rows that were asked for before. Called on the event loop: both must be quick."""

    def get(self, row: Any, /) -> float | None: ...
    def put(self, row: Any, value: float, /) -> None: ...


class RemoteReward:
    """Base of rewards that ask endpoints, in fall-back order; a subclass says what is asked.

    A subclass makes `endpoints` in its constructor, which takes the `params` of the configuration and no more, and
    defines `rows`. `build_rewards` then calls `set_up` with the keys that stand beside `params`.

    Attributes:
        kind: `judge` or `service`.
        warmup: First rows of a process that are asked one after another, before the others.
        cache: Scores known already; None asks always.
    """

    kind = "remote"
    warmup = 1
    cache: Cache | None = None

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self.name, self.where = self.kind, "rewards"

    def set_up(self, name: str, where: str, *, concurrency: int | None = None, deadline_s: float | None = None) -> None:
        """Take name and key path of the reward, and its limits (see `config.rewards.RewardItem`)."""

    @property
    def http(self) -> httpx2.AsyncClient:
        """The client of this process and the running event loop; for `openai`: `http_client=self.http`."""
        raise NotImplementedError

    def rows(self, batch: Mapping[str, Any]) -> list[Any]:
        """What is asked for each completion of a batch, the keywords that TRL gives a reward function."""
        raise NotImplementedError

    async def __call__(self, **batch: Any) -> list[float]:
        """Scores of a batch, `FAILED` where there is none; RewardError where an endpoint refuses."""
        raise NotImplementedError

    async def warm_up(self, batch: Mapping[str, Any]) -> None:
        """Ask the first rows of a batch, one after another."""

    def calls(self) -> RemoteCalls:
        """Calls since `reset`."""
        raise NotImplementedError

    def reset(self) -> None:
        """Begin to count anew."""
