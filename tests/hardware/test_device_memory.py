"""Memory on a GPU by counters alone: the peak that was needed, an engine that sleeps, and a device that is not used."""

from __future__ import annotations

import pytest

from grpo_autotune.hardware.device_memory import DeviceMemory, cuda_in_use, expand_segments
from tests.support.fake_cuda import GIB, FakeCuda, cuda, sleeping_pool

__all__ = ["cuda"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_peak_outlasts_the_readings_that_reset_it(cuda: FakeCuda) -> None:
    memory = DeviceMemory(Clock())
    memory()
    cuda.allocate(10 * GIB)
    cuda.allocate(-9 * GIB)
    assert memory() == 10 * GIB
    cuda.empty_cache()
    cuda.allocate(GIB)
    assert memory() == 2 * GIB
    assert memory.allocated_bytes == 10 * GIB
    memory.restart()
    assert memory() == 2 * GIB == memory.allocated_bytes


def test_the_cache_is_not_what_was_needed(cuda: FakeCuda) -> None:
    memory = DeviceMemory(Clock())
    memory()
    cuda.reserved = cuda.reserved_peak = 34 * GIB
    cuda.allocate(3 * GIB)
    cuda.outside += GIB
    cuda.retries, cuda.ooms = 4, 1
    memory()
    assert memory.facts() == {
        "allocated_bytes": 3 * GIB,
        "reserved_bytes": 34 * GIB,
        "outside_bytes": GIB,  # without the context, which was there at the first reading
        "device_bytes": 36 * GIB,
        "retries": 4,
        "failures": 1,
    }
    memory.restart()
    assert memory.facts()["retries"] == 0


def test_an_engine_that_sleeps_holds_nothing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sleeping_pool(monkeypatch, 16 * GIB, 24 * GIB)
    cuda.allocate(40 * GIB)
    memory = DeviceMemory(Clock())
    assert memory() == 40 * GIB
    for row in rows:
        row.is_asleep = True
    cuda.asleep = 40 * GIB
    assert memory() == 40 * GIB  # it was awake when the last reading was made
    cuda.allocate(12 * GIB)
    cuda.allocate(-12 * GIB)
    assert memory() == 12 * GIB and memory.in_use() == 0
    rows[0].is_asleep = False  # its weights alone
    cuda.asleep = 24 * GIB
    assert memory() == 16 * GIB
    assert memory.outside_bytes == 0 and memory.device_bytes == 41 * GIB


def test_the_driver_is_asked_now_and_then(cuda: FakeCuda) -> None:
    times = iter([0.0, 0.001, 0.002, 0.5])
    memory = DeviceMemory(lambda: next(times))
    for _ in range(4):
        memory()
    assert cuda.calls == ["mem_get_info"] * 2


def test_a_device_that_is_not_used_is_left_alone(cuda: FakeCuda) -> None:
    cuda.started = False
    memory = DeviceMemory(Clock())
    assert cuda_in_use() is None and memory() == 0 and memory.in_use() == 0 and cuda.calls == []


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_grow_unless_the_user_set_the_allocator_up(name: str) -> None:
    environment: dict[str, str] = {}
    expand_segments(environment)
    assert environment == dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    own = {name: "max_split_size_mb:64"}
    expand_segments(own)
    assert own == {name: "max_split_size_mb:64"}
