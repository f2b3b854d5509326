"""A GPU that is only counted: `torch.cuda` as far as memory goes, and vLLM's pool for an engine that sleeps."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 1 << 30


class FakeCuda:
    """The allocator's counters and the device's memory, as torch and the driver give them.

    Attributes:
        outside: Bytes in use on the device beside the allocator's.
        failure: Raised by every call that reaches the driver.
        calls: Names of those calls.
    """

    def __init__(self, total: int = 80 * GIB, outside: int = GIB) -> None:
        self.total, self.outside = total, outside
        self.started = True
        self.failure: BaseException | None = None
        self.calls: list[str] = []
        self.allocated = self.allocated_peak = self.reserved = self.reserved_peak = self.asleep = 0
        self.retries = self.ooms = 0

    def allocate(self, size: int) -> None:
        """Take from the cache what it has, the rest from the device; a negative size goes back to the cache."""
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.started

    def memory_allocated(self) -> int:
        return self.allocated

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"current": self.allocated, "peak": self.allocated_peak}},
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.reserved_peak}},
            "num_alloc_retries": self.retries,
            "num_ooms": self.ooms,
        }

    def reset_peak_memory_stats(self) -> None:
        self.allocated_peak, self.reserved_peak = self.allocated, self.reserved

    def mem_get_info(self) -> tuple[int, int]:
        self._reach("mem_get_info")
        return self.total - self.outside - self.reserved + self.asleep, self.total

    def synchronize(self) -> None:
        self._reach("synchronize")

    def empty_cache(self) -> None:
        self._reach("empty_cache")
        self.reserved = self.allocated

    def _reach(self, call: str) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """torch on a machine with a GPU that it has begun to use."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def sleeping_pool(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> list[Any]:
    """vLLM's pool of an engine, awake; the rows of its table."""
    rows = [SimpleNamespace(handle=(0, size, 0, 0), is_asleep=False) for size in sizes]
    pool = SimpleNamespace(pointer_to_data=dict(enumerate(rows)))
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=pool))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    return rows
