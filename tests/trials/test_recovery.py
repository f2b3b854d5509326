"""Between two trials: a process that cannot be killed, and a GPU whose memory takes a while to come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from grpo_autotune.processes.guarded import GONE_S, until_gone
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.trials.parent.recovery import BACK_S, STILL_S, used_gpu_bytes
from grpo_autotune.trials.parent.runner import Runner
from grpo_autotune.trials.parent.worker import Worker
from tests.support.nvml import GIB, Card, with_gpus


class Time:
    """A clock that waiting alone moves on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Process:
    """A process by what psutil tells of it.

    Args:
        lives_s: Seconds until it is gone.
        status: Meanwhile.
        threads: Meanwhile.
    """

    def __init__(self, time: Time, lives_s: float, status: str = psutil.STATUS_DISK_SLEEP, threads: int = 1) -> None:
        self._time, self._lives_s, self._status, self._threads = time, lives_s, status, threads

    def is_running(self) -> bool:
        return self._time.now < self._lives_s

    def status(self) -> str:
        return self._status

    def num_threads(self) -> int:
        return self._threads


@pytest.mark.parametrize(
    ("lives_s", "status", "threads", "left", "waited_s"),
    [
        (2.0, psutil.STATUS_DISK_SLEEP, 9, False, 2.0),
        (9e9, psutil.STATUS_DISK_SLEEP, 9, True, GONE_S),
        (9e9, psutil.STATUS_ZOMBIE, 3, True, GONE_S),  # its first thread has ended, and another is in the driver
        (9e9, psutil.STATUS_ZOMBIE, 1, False, 0.0),  # nobody has waited for it
    ],
)
def test_a_killed_process_is_waited_for_with_a_limit(
    lives_s: float, status: str, threads: int, left: bool, waited_s: float
) -> None:
    time = Time()
    process = Process(time, lives_s, status, threads)
    assert until_gone([cast(psutil.Process, process)], time, time.wait) == [process] * left
    assert time.now == pytest.approx(waited_s, abs=0.1)


class Stuck:
    """A worker that never takes its trial up; `is_lost` is what its processes do once it is ended."""

    def __init__(self, lost: bool) -> None:
        self._lost, self.is_lost, self._code = lost, False, cast("int | None", None)

    def order(self, folder: Path) -> bool:
        return True

    def poll(self) -> int | None:
        return self._code

    def end(self) -> None:
        self._code, self.is_lost = -9, self._lost


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Any]:
    def runner(lost: bool, used: Callable[[Time], int | None]) -> Any:
        time, workers = Time(), list[Stuck]()

        def spawn(folder: Path, log: Path, world_size: int) -> Worker:
            workers.append(Stuck(lost))
            return cast(Worker, workers[-1])

        made = Runner(tmp_path, clock=time, wait=time.wait, spawn=spawn, used=lambda: used(time))

        def run(number: int) -> TrialOutcome:
            return made.run(TrialSpec(number=number, config={}, limit_s=5.0))

        return SimpleNamespace(run=run, time=time, workers=workers)

    return runner


def test_a_worker_that_cannot_be_killed_loses_the_gpu(trial: Callable[..., Any], tmp_path: Path) -> None:
    trials = trial(lost=True, used=lambda time: None)
    first, second = trials.run(0), trials.run(1)
    assert first.status == "timeout" and "start-up; gpu lost: a process of a trial" in first.why
    assert second.status == "crashed" and second.why.startswith("gpu lost") and len(trials.workers) == 1
    for outcome in (first, second):
        stored = (tmp_path / "trials" / f"000{outcome.number}" / "outcome.json").read_text()
        assert TrialOutcome.model_validate_json(stored) == outcome
    trials.workers[0].is_lost = False  # the driver has let it go
    assert trials.run(2).status == "timeout" and len(trials.workers) == 2


@pytest.mark.parametrize(
    ("used", "waited_s"),
    [
        (lambda time: GIB if time.now < 4.0 or time.now > 7.0 else 40 * GIB, 2.0),  # back two seconds after the end
        (lambda time: GIB if time.now < 4.0 else 40 * GIB, STILL_S),  # somebody else's
        (lambda time: GIB if time.now < 4.0 else round((100 - time.now / 2) * GIB), BACK_S),
        (lambda time: None, 0.0),
    ],
)
def test_memory_is_back_before_the_next_trial_starts(
    trial: Callable[..., Any], used: Callable[[Time], int | None], waited_s: float
) -> None:
    trials = trial(lost=False, used=used)
    trials.run(0)
    assert trials.time.now == pytest.approx(5.0, abs=0.1)
    trials.run(1)
    assert trials.time.now - 10.0 == pytest.approx(waited_s, abs=0.4)


def test_what_is_in_use_is_that_of_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    assert used_gpu_bytes() is None
    with_gpus(monkeypatch, Card(used_bytes=GIB), Card(used_bytes=2 * GIB, uuid="GPU-1"), Card(memory_bytes=None))
    assert used_gpu_bytes() == 3 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert used_gpu_bytes() == 2 * GIB
