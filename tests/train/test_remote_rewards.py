"""Rewards over a network against a server that goes wrong: every batch ends, and no score is made up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from grpo_autotune.errors import ConfigError, RewardError
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.batch import RemoteReward
from grpo_autotune.train.rewards.remote.client import aclose
from grpo_autotune.train.rewards.remote.limits import Breaker, Pace, Policy, Slots
from grpo_autotune.train.rewards.remote.replies import Busy, Endpoint, Failed, Reply, retry_after
from grpo_autotune.train.rewards.remote.service import Service
from tests.support.fault_server import TRANSIENT, FaultServer, at_rate

QUICK = Policy(wait_s=(0.001, 0.004), call_s=1.0, cooldown_s=0.05, open_s=0.05)


def service(url: str, policy: Policy = QUICK, timeout_s: float = 0.2, **params: Any) -> Service:
    reward = Service(**{"url": url, "body": {"value": "{{ value }}"}, "timeout_s": timeout_s, **params})
    reward.policy = policy
    return reward


def batch(values: Sequence[float], **more: Any) -> dict[str, Any]:
    texts = [f"answer {value}" for value in values]
    return {"prompts": ["a question"] * len(texts), "completions": texts, "value": list(values), **more}


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` returns, its client closed on the same loop."""

    async def whole() -> Any:
        try:
            return await work()
        finally:
            await aclose()

    return asyncio.run(whole())


async def batches(reward: RemoteReward, count: int, rows: int) -> list[float]:
    """Scores of so many batches; the n-th row's true score is n."""
    scores: list[float] = []
    for number in range(count):
        scores += await reward(**batch([float(number * rows + row) for row in range(rows)]))
    return scores


@pytest.mark.parametrize("faults", [*[(fault,) for fault in TRANSIENT], TRANSIENT], ids="-".join)
def test_batches_end_whatever_the_server_does(faults: tuple[str, ...]) -> None:
    count, rows = (50, 8) if len(faults) > 1 else (6, 16)
    threads = set(threading.enumerate())
    with FaultServer(at_rate(faults, 0.2)) as server:
        reward = service(server.url, timeout_s=0.05)
        scores = run(lambda: batches(reward, count, rows))
        assert server.connections() == 0
        late = [call for call in server.calls if call.end_s and call.end_s - call.begin_s > 1.0]
    failed = [number for number, score in enumerate(scores) if score is FAILED]
    assert [score for score in scores if score is not FAILED] == [n for n in range(count * rows) if n not in failed]
    assert len(failed) < 0.1 * len(scores)
    calls = reward.calls()
    assert calls.calls == len(server.calls)
    assert 0 < calls.retries <= 0.2 * len(scores) + QUICK.extra_least
    assert calls.rate_limited == sum(call.fault.startswith("429") for call in server.calls)
    assert sum(calls.failures.values()) == len(failed)
    assert not late
    assert {thread for thread in threading.enumerate() if "process_request" not in thread.name} <= threads
