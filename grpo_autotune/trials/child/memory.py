"""Memory of one trial inside a process that serves several: what is idle, the peak since then, and what is left after.

On the CPU `ru_maxrss` never falls, so the kernel's high-water mark is reset before each trial (proc(5): 5 into
`clear_refs`) and read as `VmHWM`. On CUDA both figures are the caching allocator's reserved bytes. torch is never
imported here: a script may set environment variables before it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import resource
import sys
from pathlib import Path
from types import FrameType

import psutil

COLLECTIONS = 3
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class MemoryMeter:
    """Idle bytes as they were on construction or at the last `restart`, and the peak since."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Take what is held now for idle."""
        release()
        self._cuda = _on_cuda()
        if self._cuda:
            sys.modules["torch"].cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # a kernel without it: then the peak is the process's own
                _CLEAR_REFS.write_text("5")
        self.idle_bytes = in_use()

    def peak_bytes(self) -> int:
        """Most bytes since construction."""
        if self._cuda:
            return int(sys.modules["torch"].cuda.max_memory_reserved())
        return max(_of_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, self.idle_bytes)


def in_use() -> int:
    """Bytes held now: the CUDA allocator's reserved, or the resident set."""
    if _on_cuda():
        return int(sys.modules["torch"].cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def release() -> None:
    """Give back what nothing refers to any more: to the device, and from the C library to the system."""
    gc.unfreeze()  # vLLM freezes what is there when its engine starts, TRL's half-built trainer included
    for _ in range(COLLECTIONS):  # a finalizer may let go of what only the next one finds
        if not gc.collect():
            break
    if _on_cuda():
        sys.modules["torch"].cuda.synchronize()
        sys.modules["torch"].cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def clear_finished_frames() -> None:
    """Empty the frames of functions that have returned: an exception that a library keeps holds its callers' locals.

    A vLLM engine's start leaves such exceptions, and with them TRL's trainer.
    """
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
    """Bytes that this process could hold under a limit of its own (`RLIMIT_AS`); None without one, and on a GPU.

    The limit counts addresses: libraries and holes in the heap take of it and hold nothing.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or _on_cuda():
        return None
    held = psutil.Process().memory_info()
    return max(0, limit - int(held.vms - held.rss))


def _on_cuda() -> bool:
    """Return whether torch was imported and has a GPU; a script may import it later, once it has chosen one."""
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_available())


def _of_status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    row = next((line for line in lines if line.startswith(f"{field}:")), None)
    return int(row.split()[1]) * 1024 if row else None
