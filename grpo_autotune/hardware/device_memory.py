"""Memory of this process on its CUDA device: what torch's allocator handed out at most, and what lies outside of it.

torch is never imported here, and no context is opened: a process that has not begun to use a GPU holds nothing on it.
"""

import math
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

LOOK_S = 0.01
"""Between two questions to the driver, which cost more than the allocator's counters: what the allocator has taken it
keeps until its cache is emptied, so that little is missed."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that configure torch's allocator, the first since torch 2.9; vLLM looks for the second alone before it
makes the pool of an engine that sleeps, which expandable segments do not go with."""

EXPANDABLE = "expandable_segments:True"
"""Segments that grow: otherwise a cache of keys and values that grows by a token leaves one behind in every size."""


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Ask torch's allocator for segments that grow, unless the user set it up; before torch is imported."""
    if not any(name in environment for name in ALLOCATOR):
        environment.update(dict.fromkeys(ALLOCATOR[:2], EXPANDABLE))


def cuda_in_use() -> Any:
    """The module `torch.cuda` where this process has begun to use a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def asleep_bytes() -> int:
    """Bytes of a vLLM engine that sleeps: torch counts them as allocated, and the device has them back, since vLLM
    unmaps the pages of its pool below torch's allocator (vllm/device_allocator/cumem.py)."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    pool = module.CuMemAllocator.instance if module is not None else None
    rows = pool.pointer_to_data.values() if pool is not None else ()
    return sum(row.handle[1] for row in rows if getattr(row, "is_asleep", False))


class DeviceMemory:
    """Peaks since `restart`, all without what an engine gave back in its sleep.

    Reading the allocator's peak resets it, so that each reading is of the time since the last one; the running maximum
    is kept here. The counters are the process's, and so is their reader (`DEVICE_MEMORY`)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self.allocated_bytes = self.reserved_bytes = 0  # of tensors, and what the allocator took of the device for them
        self.outside_bytes = 0  # added outside of it since the first reading (NCCL, libraries, captured graphs)
        self.device_bytes = 0  # in use on the whole device, by other processes too
        self._outside_at_first: int | None = None
        self._looked_at = -math.inf
        self._asleep = asleep_bytes()
        cuda = cuda_in_use()
        self._before = self._counts = _counts(cuda.memory_stats_as_nested_dict() if cuda is not None else {})
        if cuda is not None:
            cuda.reset_peak_memory_stats()

    def __call__(self) -> int:
        """Most bytes that tensors had since the last call."""
        cuda = cuda_in_use()
        if cuda is None:
            return 0
        stats = cuda.memory_stats_as_nested_dict()  # `memory_stats` would flatten and sort it
        cuda.reset_peak_memory_stats()
        asleep = asleep_bytes()
        away, self._asleep = min(asleep, self._asleep), asleep
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        peak = max(0, int(allocated["peak"]) - away)
        self.allocated_bytes = max(self.allocated_bytes, peak)
        self.reserved_bytes = max(self.reserved_bytes, int(reserved["peak"]) - away)
        self._counts = _counts(stats)
        self._look(cuda, int(reserved["current"]) - asleep)
        return peak

    def in_use(self) -> int:
        cuda = cuda_in_use()
        return 0 if cuda is None else max(0, int(cuda.memory_allocated()) - asleep_bytes())

    def facts(self) -> dict[str, int]:
        """The peaks by name, and how often the allocator had to empty its cache for room (`retries`) and found none
        (`failures`)."""
        names = ("allocated_bytes", "reserved_bytes", "outside_bytes", "device_bytes")
        retries, failures = (now - before for now, before in zip(self._counts, self._before, strict=True))
        return {name: getattr(self, name) for name in names} | {"retries": retries, "failures": failures}

    def _look(self, cuda: Any, reserved: int) -> None:
        """Ask the driver what is in use beside the allocator's `reserved` bytes."""
        now = self._clock()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        free, total = cuda.mem_get_info()
        used = int(total) - int(free)
        if self._outside_at_first is None:
            self._outside_at_first = used - reserved
        self.device_bytes = max(self.device_bytes, used)
        self.outside_bytes = max(self.outside_bytes, used - reserved - self._outside_at_first)


def _counts(stats: dict[str, Any]) -> tuple[int, int]:
    return int(stats.get("num_alloc_retries", 0)), int(stats.get("num_ooms", 0))


DEVICE_MEMORY = DeviceMemory()
