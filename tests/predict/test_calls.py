"""Seconds of calls over a network with other numbers of them at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from grpo_autotune.predict.calls import batch_s, longest_s, scheduled_s
from grpo_autotune.predict.models import Models
from grpo_autotune.records.probe import ProbeRecord, RewardCall
from grpo_autotune.records.rewards import CallTimes
from grpo_autotune.records.trial import TrialOutcome
from tests.support.sample_records import CPU_MACHINE, config_of, judged_record, remote_calls, timings

EQUAL = CallTimes(p50=0.1, p95=0.1, p99=0.1)
SLOWED = CallTimes(p50=1.0, p95=2.5, p99=3.0)


def with_lanes(record: ProbeRecord, *lanes: int | None) -> Any:
    return config_of(record, rewards=[{"name": "exact_match", "concurrency": n} for n in lanes])


def test_equal_calls_take_as_many_rounds_as_they_need() -> None:
    assert scheduled_s(EQUAL, 256, 16) == pytest.approx(1.6)
    assert scheduled_s(EQUAL, 257, 16) == pytest.approx(1.7)
    assert scheduled_s(EQUAL, 3, 16) == pytest.approx(0.1)


def test_more_at_once_is_never_slower_and_never_below_the_slowest_call() -> None:
    took = [scheduled_s(SLOWED, 64, lanes) for lanes in range(1, 65)]
    assert took[0] == pytest.approx(64 * 1.2, rel=0.1), "the mean of a log-normal with these percentiles is 1.17"
    assert took[-1] == pytest.approx(3.0, rel=0.1)
    assert all(later <= before * 1.1 for before, later in itertools.pairwise(took))


def test_a_batch_is_predicted_in_proportion_to_those_measured() -> None:
    one = remote_calls(batch_s=33.0)
    assert batch_s(one) == pytest.approx(11.0), "twice what its calls alone would take"
    assert batch_s(one, 16) == pytest.approx(2 * batch_s(remote_calls(), 16))
    assert batch_s(remote_calls(calls=0, call_s=None, cache_hits=48)) == 0.0
    cached = remote_calls(cache_hits=24, calls=24, batch_s=9.0)
    assert batch_s(cached, rows=16) == pytest.approx(scheduled_s(SLOWED, 16, 4) / scheduled_s(SLOWED, 8, 4) * 3.0)


def test_rewards_that_ask_side_by_side_take_as_long_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    record = judged_record(remote_calls(), remote_calls(place=1, batch_s=3.0))
    assert longest_s(record.remote, with_lanes(record, 4, 4)) == pytest.approx(5.5)
    assert longest_s(record.remote, with_lanes(record, 16, 4)) < 5.5
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert longest_s(record.remote, with_lanes(record, 16, 4)) == pytest.approx(5.5), (
        "four at once on each of four ranks"
    )


def test_the_step_is_shorter_by_what_the_batch_is() -> None:
    record = judged_record()
    base, wider = with_lanes(record, 4), with_lanes(record, 16)
    models = Models.from_probe(base, record, CPU_MACHINE)
    shorter = longest_s(record.remote, base) - longest_s(record.remote, wider)
    before, after = models.stages_s(base), models.stages_s(wider)
    assert before["reward"].value - after["reward"].value == pytest.approx(shorter)
    assert before["backward"] == after["backward"]


def test_no_less_than_plain_rewards_take_and_nothing_of_what_was_hidden() -> None:
    plain = RewardCall(name="exact_match", is_async=False, calls=3, mean_s=0.3, max_s=0.4)
    hidden = judged_record(timings=timings({"generation": 6.0, "reward": 0.5, "backward": 1.0}), rewards=[plain])
    models = Models.from_probe(with_lanes(hidden, 4), hidden, CPU_MACHINE)
    assert models.stages_s(with_lanes(hidden, 16))["reward"].value == pytest.approx(0.3)


def test_a_trial_with_other_calls_at_once_is_believed_over_the_schedule() -> None:
    record = judged_record()
    base, wider = with_lanes(record, 4), with_lanes(record, 16)
    models = Models.from_probe(base, record, CPU_MACHINE)
    seconds = {row.name: row.per_step_s[1] for row in record.timings.stages} | {"reward": 5.0}
    seen = record.model_copy(update={"timings": timings(seconds)})
    learnt = models.learn(wider, TrialOutcome(number=1, status="ok", record=seen, step_s=seen.timings.step_s))
    assert learnt.stages_s(wider)["reward"].value == pytest.approx(5.0, rel=0.05), "the endpoint did not bear them"
    assert learnt.stages_s(base)["reward"].value == pytest.approx(5.5, rel=0.05)
