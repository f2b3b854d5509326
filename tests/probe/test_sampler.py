"""The load by other processes while a probe measures."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest

from grpo_autotune.advice.bound import warnings
from grpo_autotune.advice.facts import Facts
from grpo_autotune.probe import sampler
from grpo_autotune.probe.breakdown import break_down
from grpo_autotune.probe.sampler import ProcessReader, Sampler, others_s
from grpo_autotune.records.probe import OtherLoad
from grpo_autotune.render.sentences import facts_lines
from grpo_autotune.report.build import build_report
from tests.support.sample_records import CPU_MACHINE, demo_record

Core = namedtuple("Core", "user system idle iowait steal guest")


def test_the_seconds_of_others_are_those_of_the_open_cores_less_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = [Core(50.0, 10.0, 900.0, 40.0, 2.0, 5.0), Core(7.0, 0.0, 900.0, 0.0, 0.0, 0.0), Core(99.0, 0, 0, 0, 0, 0)]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: cores)
    monkeypatch.setattr(sampler, "_open_cores", lambda: {0, 1})
    monkeypatch.setattr(sampler, "_own_pids", lambda: {1, 2, 3})

    def process(pid: int) -> SimpleNamespace:
        if pid == 3:
            raise psutil.NoSuchProcess(pid)
        return SimpleNamespace(cpu_times=lambda: (10.0, 2.0, 1.0, 0.5, 99.0))

    monkeypatch.setattr(psutil, "Process", process)
    assert others_s(1)[1] == pytest.approx(50 + 10 + 2 + 7 - 2 * 13.5)
    assert others_s(2)[1] == pytest.approx(50 + 10 + 2 + 7 - 4 * 13.5), "a sibling rank works as much"


def test_a_process_is_read_in_percent_of_one_core_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    walls, works = iter([10.0, 12.0, 12.5]), iter([1.0, 4.0, 4.0])
    clocks = SimpleNamespace(perf_counter=lambda: next(walls), process_time=lambda: next(works))
    monkeypatch.setattr(sampler, "time", clocks)
    reader = ProcessReader(lambda: 7)
    assert [reader.read()["cpu_percent"] for _ in range(2)] == [150.0, 0.0]
    monkeypatch.undo()
    assert ProcessReader().read()["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


@pytest.mark.parametrize(
    ("cores", "of", "on_gpu", "load"),
    [
        (1.0, 2, False, (1.0, True)),
        (0.1, 2, False, (0.1, False)),
        (1.0, 64, False, (1.0, True)),
        (0.4, 64, False, (0.4, False)),
        (1.0, 16, True, (1.0, False)),
        (9.0, 16, True, (9.0, True)),
        (-0.01, 2, False, (0.0, False)),
        (-0.9, 2, False, None),
    ],
)
def test_the_load_matters_where_steps_may_be_longer_for_it(
    monkeypatch: pytest.MonkeyPatch, cores: float, of: int, on_gpu: bool, load: tuple[float, bool] | None
) -> None:
    looks = iter([(100.0, 7.0), (110.0, 7.0 + 10.0 * cores)])
    monkeypatch.setattr(sampler, "others_s", lambda ranks: next(looks))
    monkeypatch.setattr(sampler, "_open_cores", lambda: set(range(of)))
    sampling = Sampler(lambda: None, [], interval_s=60.0)
    assert sampling.others(on_gpu=on_gpu) is None
    sampling.start()
    sampling.stop()
    seen = sampling.others(on_gpu=on_gpu)
    assert (None if seen is None else (pytest.approx(seen.cores), seen.matters)) == load


def test_the_load_stands_in_a_report_and_warns_where_it_matters() -> None:
    for matters in (True, False):
        record = demo_record(others=OtherLoad(cores=1.0, of=2, gpu_percent=7.0, matters=matters))
        words = "other processes took 1.00 of 2 cores and 7% of the GPU's time"
        assert words in facts_lines(build_report(record, CPU_MACHINE))[-1]
        facts = Facts(record=record, breakdown=break_down(record.timings), limits={}, machine=CPU_MACHINE, config=None)
        assert any(words in line for line in warnings(facts)) is matters
