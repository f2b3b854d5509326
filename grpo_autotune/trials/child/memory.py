"""Memory of one trial inside a process that serves several: what is idle, the peak since then, and what is left after.

On the CPU `ru_maxrss` never falls, so the kernel's high-water mark is reset before each trial (proc(5): 5 into
`clear_refs`) and read as `VmHWM`. On CUDA it is what tensors had at most, as `hardware.device_memory` counts it. Which
of the two counts is known at the end, by what the process came to use: a machine with a GPU may train on its processor.
torch is never imported here: a script may set environment variables before it does.
"""

import contextlib
import ctypes
import gc
import inspect
import resource
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil

from grpo_autotune.hardware.device_memory import DEVICE_MEMORY, cuda_in_use
from grpo_autotune.records.probe import DeviceMemory

COLLECTIONS = 3
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Idle(NamedTuple):
    """Bytes held before a model is there, on the host and on the device."""

    host: int
    device: int


class MemoryMeter:
    """Memory of a trial since construction or the last `restart`; `idle` is what was held then."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Take what is held now for idle."""
        release()
        with contextlib.suppress(OSError):  # a kernel without it: then the peak is the process's own
            _CLEAR_REFS.write_text("5")
        DEVICE_MEMORY.restart()
        self.idle = Idle(in_use(), DEVICE_MEMORY.in_use())

    def facts(self, *, ran_out: bool = False) -> dict[str, Any]:
        """Peak and idle bytes by the names of `TrialOutcome`: the device's where this process uses one. Where memory
        `ran_out`, what was held was not enough, whatever tensors had of it."""
        if cuda_in_use() is None:
            peak = _of_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"peak_bytes": max(peak, self.idle.host), "idle_bytes": self.idle.host}
        with contextlib.suppress(RuntimeError):  # a device that failed says nothing more
            DEVICE_MEMORY()
        device = DeviceMemory(**DEVICE_MEMORY.facts())
        most = device.reserved_bytes if ran_out else device.allocated_bytes
        idle = self.idle.device + device.outside_bytes
        return {"peak_bytes": most + device.outside_bytes, "idle_bytes": idle, "device_memory": device}


def in_use() -> int:
    """Bytes of the resident set now."""
    return int(psutil.Process().memory_info().rss)


def release() -> None:
    """Give back what nothing refers to any more: to the device, and from the C library to the system. A RuntimeError
    (`torch.AcceleratorError`) says that the device failed, perhaps in an earlier call."""
    if "vllm" in sys.modules:  # it freezes what is there when its engine starts, TRL's half-built trainer included
        gc.unfreeze()
    for _ in range(COLLECTIONS):  # a finalizer may let go of what only the next one finds
        if not gc.collect():
            break
    if (cuda := cuda_in_use()) is not None:
        cuda.synchronize()
        cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def clear_finished_frames() -> None:
    """Empty the frames of functions that have returned: an exception that a library keeps, as a vLLM engine's start
    leaves them, holds its callers' locals, and with them TRL's trainer."""
    for frame in gc.get_objects():
        if isinstance(frame, FrameType) and not frame.f_code.co_flags & _SUSPENDS:
            with contextlib.suppress(RuntimeError):  # it still runs
                frame.clear()


def available_bytes() -> int | None:
    """Bytes that this process could still allocate on the host: the machine's, or what `RLIMIT_AS` leaves."""
    left = int(psutil.virtual_memory().available)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left = min(left, max(0, limit - int(psutil.Process().memory_info().vms)))
    return left


def most_bytes() -> int | None:
    """Bytes that this process could hold under a limit of its own (`RLIMIT_AS`); None without one, and on a GPU. The
    limit counts addresses: libraries and holes in the heap take of it and hold nothing."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or cuda_in_use() is not None:
        return None
    held = psutil.Process().memory_info()
    return max(0, limit - int(held.vms - held.rss))


def _of_status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    row = next((line for line in lines if line.startswith(f"{field}:")), None)
    return int(row.split()[1]) * 1024 if row else None
