"""Signs that memory ran out: an error's class with its message, and the kernel's own kills.

A message alone says nothing: somebody's judge may report `out of memory`. It is read only where the class is one that
the allocators raise beside other errors.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path

SIGNS = (
    ("MemoryError", ""),  # CPython's
    ("OutOfMemoryError", ""),  # torch's, for a device
    ("OSError", rf"\[Errno {errno.ENOMEM}\]"),  # the kernel refuses
    ("RuntimeError", "(?s:.*)DefaultCPUAllocator: "),  # torch's, for the host (c10/core/impl/alloc_cpu.cpp)
    ("RuntimeError", r"std::bad_alloc"),  # C++'s, through pybind11
    ("RuntimeError", rf"unable to mmap (?s:.*)\({errno.ENOMEM}\)$"),  # weights (aten/src/ATen/MapAllocator.cpp)
    ("SafetensorError", rf"(?s:.*)\bos error {errno.ENOMEM}\b"),  # as Rust words the kernel's refusal
)
"""Class, and the pattern at the start of its message that tells memory from other reasons."""

NO_THREAD = "can't start new thread"
"""CPython's message (Modules/_threadmodule.c) for a stack that could not be mapped, or for too many threads."""

STACK_BYTES = 16 << 20
"""A thread's stack is 8 MiB by default."""

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = rf"([\d.]+) ({'|'.join(_UNITS)})"
_REQUESTED = re.compile(rf"[Tt]ried to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")


def is_memory_sign(classes: Iterable[str], message: str) -> bool:
    """Return whether an error says that memory ran out, on the device or the host.

    Args:
        classes: Names of its class and of the classes above it; a log gives the first alone.
        message: Its message.
    """
    names = set(classes)
    return any(name in names and re.match(pattern, message) is not None for name, pattern in SIGNS)


def is_out_of_memory(error: BaseException, available: Callable[[], int | None] = lambda: None) -> bool:
    """Return whether an exception says that memory ran out, on the device or the host.

    Args:
        error: The exception.
        available: Bytes that this process could still have: a thread that cannot be started counts only where its stack
            has no room. None is not known.
    """
    if type(error) is RuntimeError and str(error) == NO_THREAD:
        left = available()
        return left is not None and left < STACK_BYTES
    return is_memory_sign((kind.__name__ for kind in type(error).__mro__), str(error))


def missing_bytes(message: str, available: Callable[[], int | None]) -> int | None:
    """Bytes requested beyond what was free; None where the message does not say what was requested.

    Args:
        message: The allocator's.
        available: Bytes that this process could still have, for a message without what was free.
    """
    requested, free = _REQUESTED.search(message), _FREE.search(message)
    if requested is None:
        return None
    left = available() if free is None else _bytes(free)
    return None if left is None or left >= _bytes(requested) else _bytes(requested) - left


def kernel_kills() -> int:
    """Processes that the kernel has killed for memory so far: in this cgroup, or in the system if that is unknown."""
    for path in _counters():
        try:
            count = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if count is not None:
            return int(count[1])
    return 0


def _counters() -> list[Path]:
    """The kernel's counters: cgroup v2's `memory.events`, v1's `memory.oom_control`, and `/proc/vmstat`."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    v1 = Path("/sys/fs/cgroup/memory")
    of_v2 = [v1.parent / path.lstrip("/") / "memory.events" for _, of, path in rows if not of]
    of_v1 = [v1 / path.lstrip("/") / "memory.oom_control" for _, of, path in rows if "memory" in of.split(",")]
    return [*of_v2, *of_v1, Path("/proc/vmstat")]


def _bytes(size: re.Match[str]) -> int:
    return round(float(size[1]) * _UNITS[size[2]])
