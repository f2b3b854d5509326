"""Rewards over a network against a server that goes wrong: every batch ends, and no score is made up."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from grpo_autotune.errors import ConfigError, RewardError
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.rewards.remote.batch import RemoteReward
from grpo_autotune.train.rewards.remote.limits import Lane, Policy
from grpo_autotune.train.rewards.remote.replies import Busy, Endpoint, Failed, Reply, aclose, retry_after
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
        reward = service(server.url, timeout_s=0.2 if {"hang", "drip"} & set(faults) else 5.0)
        scores = run(lambda: batches(reward, count, rows))
        assert server.connections() == 0
        late = [call for call in server.calls if call.end_s and call.end_s - call.begin_s > 1.0]
    failed = [number for number, score in enumerate(scores) if score is FAILED]
    assert [score for score in scores if score is not FAILED] == [n for n in range(count * rows) if n not in failed]
    assert len(failed) < 0.5 * len(scores)
    calls = reward.calls()
    unseen = calls.calls - len(server.calls)  # given up on a busy machine before the server had read them
    unread = (
        sum(call.fault.startswith("429") for call in server.calls) - calls.rate_limited
    )  # or before its answer came
    assert 0 <= unseen <= calls.failures.get("timeout", 0)
    assert 0 < calls.retries <= 0.2 * len(scores) + QUICK.extra_least
    assert 0 <= unread <= (calls.calls if {"hang", "drip"} & set(faults) else 0)
    assert sum(calls.failures.values()) == len(failed)
    assert not late
    assert {thread for thread in threading.enumerate() if "process_request" not in thread.name} <= threads


def test_a_deadline_ends_what_hangs_and_a_cancelled_batch_leaves_nothing() -> None:
    with FaultServer(lambda number: "ok" if number < 2 else "hang") as server:
        reward = service(server.url, timeout_s=30.0)
        reward.set_up("service", "rewards[0]", deadline_s=0.3)

        async def work() -> tuple[list[float], float]:
            begin_s = time.monotonic()
            scores = await reward(**batch(range(40)))
            took_s = time.monotonic() - begin_s
            cancelled = asyncio.create_task(reward(**batch(range(4))))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            assert isinstance((await asyncio.gather(cancelled, return_exceptions=True))[0], asyncio.CancelledError)
            return scores, took_s

        scores, took_s = run(work)
        assert scores[:2] == [0.0, 1.0] and scores[2:] == [FAILED] * 38 and took_s < 0.6
        assert reward.calls().failures == {"deadline": 38}  # those in the queue, too
        assert reward.calls().wait_s is not None and len(server.calls) == 2 + 20 + 4
        assert server.connections() == 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "401",
            r"rewards\[1\]\.params\.url: 127\.0\.0\.1:\d+ answered 401: .*\*\*\*.*Check the key in the environment",
        ),
        ("404", r"answered 404: Not Found\. Check the address"),
    ],
)
def test_a_refusal_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch, fault: str, told: str) -> None:
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    with FaultServer(lambda number: "ok" if number < 5 else fault) as server:
        reward = service(server.url, headers_env={"X-Key": "A_KEY"})
        reward.set_up("service", "rewards[1]")
        with pytest.raises(RewardError, match=told) as error:
            run(lambda: reward(**batch(range(60))))
        assert len(server.calls) < 60 and server.calls[0].headers["X-Key"] == "sk-very-secret"
        assert "very" not in f"{error.value!r} {vars(reward)}"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (None, "connect: All connection attempts failed"),
        ("schema", "schema: no number at .+verdict"),
        ("hang", "timeout"),
    ],
)
def test_an_endpoint_that_never_answered_ends_the_run(fault: str | None, told: str) -> None:
    with FaultServer(lambda number: str(fault)) as server:
        url = server.url if fault else "http://127.0.0.1:9/score"
        with pytest.raises(RewardError, match=rf"has given no score yet, \d+ calls failed \({told}.*Is it up"):
            run(lambda: service(url, timeout_s=0.03)(**batch(range(30))))


def test_first_calls_that_nobody_answers_end_the_run() -> None:
    with FaultServer(lambda number: "hang") as server:
        reward = service(server.url, timeout_s=30.0)
        reward.set_up("service", "rewards[0]", deadline_s=0.1)
        with pytest.raises(RewardError, match=r"no score yet, 1 call failed \(deadline: no answer within 0.1 s"):
            run(lambda: reward.warm_up(batch(range(8))))


def test_no_first_calls_are_asked_for_where_none_are_wanted() -> None:
    with FaultServer() as server:
        run(lambda: service(server.url, warmup=0).warm_up(batch(range(8))))
        assert not server.calls


class Script(RemoteReward):
    """Two endpoints that answer as told: a value, or an error to raise; `asked` says who was asked, when."""

    def __init__(self, *answers: Callable[[int], Any], policy: Policy = QUICK, rpm: int | None = None) -> None:
        self.asked: list[tuple[str, float]] = []
        names = [f"judge-{number}" for number in range(len(answers))]
        asks = [self.ask(*pair) for pair in zip(names, answers, strict=True)]
        super().__init__([Endpoint(name, ask, rpm) for name, ask in zip(names, asks, strict=True)], policy)

    def ask(self, name: str, answer: Callable[[int], Any]) -> Callable[[Any], Coroutine[Any, Any, Reply]]:
        async def asked(row: Any) -> Reply:
            number = sum(who == name for who, _ in self.asked)
            self.asked.append((name, time.monotonic()))
            await asyncio.sleep(0.001)
            value = answer(number)
            if isinstance(value, Exception):
                raise value
            return Reply(value, tokens_in=10, cost=0.25)

        return asked

    def rows(self, batch: Any) -> list[Any]:
        return list(batch["completions"])


def test_calls_fall_back_while_the_first_endpoint_is_down_and_come_back() -> None:
    columns: dict[str, list[Any]] = {}
    reward = Script(lambda n: 1.0 if n < 2 or n > 25 else Failed("503"), lambda n: 0.5)

    async def work() -> list[list[float]]:
        scores = [await reward(**batch(range(60)), log_extra=columns.__setitem__)]
        await asyncio.sleep(0.06)
        for _ in range(9):
            scores.append(await reward(**batch(range(8)), log_extra=columns.__setitem__))
            await asyncio.sleep(0.06)
        return scores

    scores = run(work)
    assert 0.5 in scores[0] and FAILED in scores[0]  # what failed beyond a fifth of the batch was not asked again
    assert scores[-1] == [1.0] * 8 and columns["async_provider"] == ["judge-0"] * 8
    calls = reward.calls()
    assert calls.fallbacks == calls.providers["judge-1"] > 40
    assert calls.retries <= 12 + 9 * 3
    assert calls.tokens_in == 10 * sum(calls.providers.values()) and calls.cost == 0.25 * sum(calls.providers.values())
    assert sum(who == "judge-0" for who, _ in reward.asked[22:60]) <= 2  # shut but for one call that tries


def test_retries_have_a_budget_in_a_batch_and_over_batches() -> None:
    reward = Script(lambda n: Failed("500") if n % 2 else 1.0, policy=Policy(wait_s=(0, 0), in_a_row=99, window=999))
    run(lambda: reward(**batch(range(100))))
    assert reward.calls().retries == 20
    reward.reset()
    run(lambda: batches(reward, 20, 5))
    assert reward.calls().retries <= 20 + 3


def test_a_row_has_four_calls_and_pauses_as_it_is_asked_to() -> None:
    policy = Policy(wait_s=(0.01, 0.02), in_a_row=99)
    reward = Script(lambda n: [Failed("500"), Busy(0.2), Busy(), 1.0][n], policy=policy)
    assert run(lambda: reward(**batch([0]))) == [1.0]
    at = [when for _, when in reward.asked]
    assert len(at) == 4 and at[1] - at[0] < 0.15 and 0.2 <= at[2] - at[1] < 0.35
    long = Script(lambda n: Busy(500.0) if n else 1.0)
    long.set_up("long", "rewards[0]", deadline_s=60.0)
    begin_s = time.monotonic()
    assert run(lambda: long(**batch([0, 1]))) == [1.0, FAILED] and len(long.asked) == 2
    assert time.monotonic() - begin_s < 5.0, "nothing is waited for that comes after the deadline"
    assert long.calls().failures == {"429": 1}


def lane(clock: Callable[[], float], fixed: int | None = None, ranks: int = 1, rpm: int | None = None) -> Lane:
    return Lane(Endpoint("judge", lambda row: asyncio.sleep(0, Reply(1.0)), rpm), fixed, ranks, Policy(), clock)


def test_calls_at_once_adapt() -> None:
    now_s = 0.0

    async def work() -> list[int]:
        nonlocal now_s
        one, limits = lane(lambda: now_s), []

        async def rounds(error: Failed | None) -> None:
            async def call() -> None:
                async with one:
                    await asyncio.sleep(0)
                    one.end(error, False)

            await asyncio.gather(*(call() for _ in range(2 * one.limit)))
            limits.append(one.limit)

        for at_s, error in [
            (0, None),
            (0, Failed("500")),
            (0, Busy()),
            (1, Busy()),
            (10, None),
            (20, None),
            (20, None),
        ]:
            now_s = at_s
            await rounds(error)
        for _ in range(20):
            now_s += 16
            await rounds(Busy())
        return limits

    limits = asyncio.run(work())
    assert limits[:7] == [40, 40, 32, 32, 32, 33, 34] and limits[-1] == 4
    assert [lane(time.monotonic, *sizes).limit for sizes in [(16, 2), (None, 4), (3, 8)]] == [8, 5, 1]


def test_calls_a_minute_and_asked_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, begun = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async def work() -> None:
        one = lane(lambda: now_s, ranks=2, rpm=6)
        for number in range(8):
            async with one:
                begun.append(now_s)
            if number == 6:
                one.end(Busy(20), False)

    monkeypatch.setattr("grpo_autotune.train.rewards.remote.limits.asyncio.sleep", sleep)
    asyncio.run(work())
    assert begun == [0, 0, 0, 60, 60, 60, 120, 140]


@pytest.mark.parametrize(("asked_s", "shut_s"), [(60.0, 60.0), (2.0, 0.0), (None, 0.0)])
def test_a_server_in_trouble_that_asks_for_a_long_pause_has_it(asked_s: float | None, shut_s: float) -> None:
    one = lane(lambda: 0.0)
    one.end(Failed("503", "", asked_s), False)
    assert one.shut_s() == shut_s


def test_a_breaker_opens_tries_and_closes() -> None:
    now_s = 0.0
    one = lane(lambda: now_s)

    def call(good: bool | None) -> float:
        tried = one.begin()
        if good is not None:
            one.end(None if good else Failed("500"), tried)
        one.leave(tried)
        return one.shut_s()

    assert [call(False) for _ in range(5)] == [0, 0, 0, 0, 30]
    now_s = 29.0
    assert one.shut_s() == 1
    now_s = 31.0
    assert one.shut_s() == 0
    tried = one.begin()
    assert tried and one.shut_s() > 0  # others wait for it
    one.leave(tried)  # given up: the next one tries
    assert one.shut_s() == 0 and call(False) == 30
    now_s = 62.0
    assert call(True) == 0
    assert [call(number % 2 == 1) for number in range(19)][-2:] == [0, 30]  # half of the last 20


def test_retry_after() -> None:
    assert retry_after("7") == 7 and retry_after("soon") is None and retry_after(None) is None
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    assert retry_after(date, lambda: 1792567680.0 - 12) == 12 and retry_after(date, lambda: 1792567680.0 + 9) == 0


def test_bodies_scores_and_what_is_wrong_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {
        "q": "{{ prompt }}",
        "a": ["{{ completion | upper }}!"],
        "n": "{{ number }}",
        "k": 5,
        "o": "{{ no | default(1) }}",
    }
    reward = Service(url="http://x/y", body=body, score="$['a b'].c[1]")
    rows = {
        "prompts": [[{"role": "user", "content": "why?"}]],
        "completions": [[{"role": "assistant", "content": "so"}]],
    }
    assert reward.rows({**rows, "number": [[1, 2]]}) == [{"q": "why?", "a": ["SO!"], "n": [1, 2], "k": 5, "o": 1}]
    assert reward.columns == {"prompt", "completion", "number"}
    assert Service(url="http://x", body='{"p": {{ prompt | tojson }} }').rows(rows) == ['{"p": "why?" }']
    for wrong, where in [
        ({"url": "localhost:8000"}, "url"),
        ({"score": "score"}, "score"),
        ({"score": "$..score"}, "score"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"body": {"a": ["{{ x"]}}, "body.a.0"),
        ({"headers_env": {"Authorization": "NO_SUCH_KEY"}}, "headers_env.Authorization"),
    ]:
        with pytest.raises(ConfigError) as error:
            Service(**{"url": "http://x", **wrong})
        assert error.value.where == where


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        *[({"score": 1}, 1.0), ({"score": True}, 1.0), ({"score": None}, FAILED), ({"score": "1"}, FAILED)],
        *[({"score": math.nan}, FAILED), ({"score": 10**400}, FAILED), ({"score": 1e39}, FAILED), ([1], FAILED)],
    ],
)
def test_only_a_number_is_a_score(answer: Any, score: float) -> None:
    good = {"score": 0.25}
    with FaultServer(answer=lambda call: answer if call.body == {"value": 3.0} else good) as server:
        scores = run(lambda: service(server.url)(**batch([0.0, 1.0, 2.0, 3.0])))
    assert scores == [0.25, 0.25, 0.25, score]


def test_another_loop_has_another_client() -> None:
    with FaultServer() as server:
        reward = service(server.url)
        assert [run(lambda: reward(**batch([1.0]))), asyncio.run(reward(**batch([2.0])))] == [[1.0], [2.0]]
        assert run(lambda: reward(**batch([3.0]))) == [3.0]
