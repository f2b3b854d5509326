"""The clocks and gauges of one device: CUDA events and the allocator's peak on a GPU, the resident set on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

RESIDENT_EVERY_S = 1e-3


class CudaTimer:
    """Events on the current stream; recording one does not wait for the GPU."""

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def done(self, mark: Any) -> bool:
        return bool(mark.query())

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000.0


def cuda_peak() -> int:
    """Most bytes the allocator held since the last call, on the current device."""
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return int(peak)


def resident_gauge() -> Callable[[], int] | None:
    """A function that tells this process's resident bytes, read at most once a millisecond; None without /proc."""
    try:
        handle = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    read_at, last = 0.0, 0

    def resident() -> int:
        nonlocal read_at, last
        now = time.perf_counter()
        if now - read_at >= RESIDENT_EVERY_S:
            read_at, last = now, int(os.pread(handle, 128, 0).split()[1]) * page
        return last

    return resident


def gauges_for(device: torch.device) -> tuple[CudaTimer | None, Callable[[], int] | None]:
    """Timer and memory gauge of `device`; the timer is None where the host's clock tells the truth."""
    if device.type == "cuda":
        return CudaTimer(), cuda_peak
    return None, resident_gauge()
