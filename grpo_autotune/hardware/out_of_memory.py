"""Signs that memory ran out, and that a GPU failed: an error's class with its message, and the kernel's own kills.

A message alone says nothing: somebody's judge may report `out of memory`. It is read only where the class is exactly
one that allocators and drivers raise beside other errors, and only from its beginning. Classes go by their full names,
so that a log can be read as an exception is, and another library's class of the same name counts for nothing.
"""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SIGNS = (
    ("MemoryError", ""),  # CPython's
    (r"torch\.OutOfMemoryError", ""),  # of the caching allocator of a device
    ("OSError", rf"\[Errno {errno.ENOMEM}\]"),  # the kernel refuses
    ("RuntimeError", "(?s:.*)DefaultCPUAllocator: "),  # torch's, for the host (c10/core/impl/alloc_cpu.cpp)
    ("RuntimeError", r"std::bad_alloc"),  # C++'s, through pybind11
    ("RuntimeError", rf"unable to mmap (?s:.*)\({errno.ENOMEM}\)$"),  # weights (aten/src/ATen/MapAllocator.cpp)
    (r"(safetensors\._)?safetensors_rust\.SafetensorError", rf"(?s:.*)\bos error {errno.ENOMEM}\b"),  # of the kernel
    (r"torch\.AcceleratorError|RuntimeError", r"CUDA error: out of memory\b"),  # outside the caching allocator
    ("RuntimeError", r"CUDA driver error: out of memory\b"),  # of an address range (c10/cuda/driver_api.h)
    ("RuntimeError", r"CUDA error: CUBLAS_STATUS_ALLOC_FAILED\b"),
    ("RuntimeError", r"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublas(Lt)?Create\("),  # no room for it
    ("RuntimeError", r"cuDNN error: CUDNN_STATUS_(INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION|ALLOC)_FAILED\b"),
    (r"torch\.distributed\.DistBackendError", r"NCCL error in: (?s:.*)Cuda failure (\d+ )?'out of memory'"),
    ("RuntimeError", r"Triton Error \[CUDA\]: out of memory$"),  # triton/backends/nvidia/driver.c
    ("RuntimeError", r"CUDA Error: out of memory at "),  # vLLM's pool that sleeps (csrc/cumem_allocator.cpp)
    ("RuntimeError", r"CUDA out of memory occurred when warming up "),  # vLLM's runner, in the place of torch's
)
"""Full name of the class and the beginning of its message; without one, the class and those under it say it alone."""

FAULTS = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "hardware stack error",
    "invalid program counter",
    "misaligned address",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "unspecified launch failure",
)
"""The driver's texts (`cuGetErrorString`) for what leaves a process in an inconsistent state, as its manual says."""

FAULT = re.compile(
    rf"(?:CUDA driver error: |CUDA Error: |CUDA error: |HIP error: |Triton Error \[CUDA\]: )(?:{'|'.join(FAULTS)})\b"
)

ENDED_ITSELF = re.compile(
    rb"^(Error out of memory at line \d+ in file \S+|memory allocation of \d+ bytes failed|"
    rb"terminate called after throwing an instance of 'std::bad_alloc')$",
    re.MULTILINE,
)
"""Last words of what ends its process for want of memory: bitsandbytes by `exit(1)` (csrc/ops.cuh), Rust's allocator
(std::alloc::handle_alloc_error) and the C++ runtime (libstdc++, vterminate.cc) by `abort()`."""

LAST_WORDS = 4096
"""Bytes at the end of a log in which they stand."""

NO_THREAD = "can't start new thread"
"""CPython's message (Modules/_threadmodule.c) for a stack that could not be mapped, or for too many threads."""

STACK_BYTES = 16 << 20
"""A thread's stack is 8 MiB by default."""

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = rf"([\d.]+) ({'|'.join(_UNITS)})"
_REQUESTED = re.compile(rf"[Tt]ried to allocate {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")


def is_memory_sign(classes: Sequence[str], message: str) -> bool:
    """Return whether an error says that memory ran out, on the device or the host: by its message, and by the full
    names of its class and of those above it (a log gives the first alone)."""
    return any(
        re.fullmatch(kind, name) is not None and re.match(text, message) is not None
        for kind, text in SIGNS
        for name in (classes[:1] if text else classes)
    )


def is_out_of_memory(error: BaseException, available: Callable[[], int | None] = lambda: None) -> bool:
    """Return whether an exception says that memory ran out, on the device or the host; a thread that cannot be started
    counts only where its stack has no room in the `available` bytes of this process (None: not known)."""
    if type(error) is RuntimeError and str(error) == NO_THREAD:
        left = available()
        return left is not None and left < STACK_BYTES
    return is_memory_sign([_full_name(kind) for kind in type(error).__mro__], str(error))


def is_device_failure(error: BaseException) -> bool:
    """Return whether an exception says that a device failed under its process, which can then do no more with it. Its
    class does not tell: torch raises it for every error of the CUDA runtime, a kernel not built for this GPU too."""
    names = {_full_name(kind) for kind in type(error).__mro__}
    raised = type(error) is RuntimeError or "torch.AcceleratorError" in names
    return raised and FAULT.match(str(error)) is not None


def is_of_the_machine(error: BaseException) -> bool:
    """Return whether memory that ran out or a failed device is behind an exception, and not the code that met it."""
    return any(is_out_of_memory(cause) or is_device_failure(cause) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from (in torch's compiler its `inner_exception`), and so on; once each, since an
    error may be raised from itself."""
    passed: set[int] = set()
    while error is not None and id(error) not in passed:
        passed.add(id(error))
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)


def ended_for_memory(log: Path) -> bool:
    """Return whether a process without an outcome says at the end of its log that it ended itself for memory."""
    try:
        return ENDED_ITSELF.search(log.read_bytes()[-LAST_WORDS:]) is not None
    except OSError:
        return False


def missing_bytes(message: str, available: Callable[[], int | None]) -> int | None:
    """Bytes requested beyond what was free, or beyond the `available` bytes of this process where the allocator's
    message does not say that; None where it does not say what was requested."""
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


def _full_name(kind: type) -> str:
    """The name of a class as a traceback shows it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
