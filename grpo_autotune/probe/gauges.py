"""The clocks and gauges of one device: CUDA events and the allocator's peak on a GPU, the resident set on a CPU."""

import os
import time
from typing import Any

import torch

from grpo_autotune.hardware.device_memory import DEVICE_MEMORY

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


class ResidentGauge:
    """This process's resident bytes, read from /proc (OSError without) at most once per millisecond."""

    def __init__(self) -> None:
        self._handle = os.open("/proc/self/statm", os.O_RDONLY)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._read_at, self._last = 0.0, 0

    def __call__(self) -> int:
        now = time.perf_counter()
        if now - self._read_at >= RESIDENT_EVERY_S:
            self._read_at = now
            self._last = int(os.pread(self._handle, 128, 0).split()[1]) * self._page
        return self._last

    def close(self) -> None:
        os.close(self._handle)


class CudaGauge:
    """Most bytes that tensors had since the last reading, on the current device; what is outside torch's allocator when
    the gauge is made does not count as added."""

    def __init__(self) -> None:
        DEVICE_MEMORY()

    def __call__(self) -> int:
        return DEVICE_MEMORY()

    def close(self) -> None:
        """Keep the interface of `ResidentGauge`: there is no file to close."""


def ranges_for(device: torch.device) -> Any:
    """NVTX ranges, for Nsight Systems, where `GRPO_AUTOTUNE_NVTX=1` asks for them on a GPU; else None."""
    return torch.cuda.nvtx if os.environ.get("GRPO_AUTOTUNE_NVTX") == "1" and device.type == "cuda" else None


def gauges_for(device: torch.device) -> tuple[CudaTimer | None, CudaGauge | ResidentGauge | None]:
    """Timer and memory gauge of `device`; the timer is None where the host's clock measures the device's work."""
    if device.type == "cuda":
        return CudaTimer(), CudaGauge()
    try:
        return None, ResidentGauge()
    except OSError:
        return None, None
