"""Why a trial failed, by the type of what was raised: a log is never searched for words.

CPU memory runs out in several guises. torch's CPU allocator raises a plain `RuntimeError`, so that class counts where
the exception itself carries the allocator's name (c10/core/impl/alloc_cpu.cpp); the kernel's refusals are `OSError`
with ENOMEM; Python's own is `MemoryError`. An error of ours counts as what it was raised from, where that was memory.
What a vLLM engine raises when it does not start is read in `engine.failures`.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from grpo_autotune.errors import ConfigError, DataError, EnvironmentProblem, RewardError
from grpo_autotune.records.trial import Status
from grpo_autotune.rollout.failures import CPU_ALLOCATOR, causes, engine_failure

BAD_ALLOC = "std::bad_alloc"
NO_THREAD = "can't start new thread"
"""CPython's words (Modules/_threadmodule.c) for a stack that could not be mapped, or for too many threads."""

STACK_BYTES = 16 << 20
"""A thread's stack is 8 MiB by default."""

ENOMEM_IN_RUST = f"os error {errno.ENOMEM}"
"""How safetensors, which is written in Rust, words the kernel's refusal in the error that it raises itself."""

NO_MAP, ENOMEM_OF_ATEN = "unable to mmap", f"({errno.ENOMEM})"
"""ATen's words (aten/src/ATen/MapAllocator.cpp) where a file of weights finds no room; the number is errno."""

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")
_FREE = re.compile(r"of which ([\d.]+) (bytes|KiB|MiB|GiB|TiB) is free")


class Failure(NamedTuple):
    """A trial's ending as the child saw it; `why` is one line."""

    status: Status
    why: str
    error_type: str
    overshoot_bytes: int | None


def failure_of(error: BaseException, available: Callable[[], int | None]) -> Failure:
    """Classify what ended a trial.

    Args:
        error: What was raised.
        available: Bytes that this process could still have, for errors that name only what was asked for.
    """
    memory = next((cause for cause in causes(error) if is_out_of_memory(cause, available)), None)
    if memory is not None:
        return Failure("oom", one_line(memory), _name(memory), overshoot(memory, available))
    if (engine := engine_failure(error)) is not None:
        needed, there = engine.needed_bytes, engine.available_bytes
        lacking = max(0, needed - there) if needed is not None and there is not None else None
        return Failure(engine.status, one_line(engine.error()), _name(list(causes(error))[-1]), lacking)
    status: Status = "crashed"
    if isinstance(error, RewardError):
        status = "reward_failed"
    elif isinstance(error, ConfigError | EnvironmentProblem | DataError):
        status = "invalid"
    return Failure(status, one_line(error), _name(error), None)


def is_out_of_memory(error: BaseException, available: Callable[[], int | None]) -> bool:
    """Whether `error` itself says that memory ran out, on the device or the host.

    A thread that cannot be started counts only where there is no room for its stack.
    """
    if isinstance(error, MemoryError) or _is_of_device(error):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if type(error) is RuntimeError and str(error) == NO_THREAD:
        return (available() or 0) < STACK_BYTES
    if type(error) is RuntimeError:
        text = str(error)
        unmapped = text.startswith(NO_MAP) and text.endswith(ENOMEM_OF_ATEN)
        return unmapped or CPU_ALLOCATOR in text or text.startswith(BAD_ALLOC)
    return type(error).__module__.startswith("safetensors") and ENOMEM_IN_RUST in str(error)


def _is_of_device(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # without it no device can have run out
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def overshoot(error: BaseException, available: Callable[[], int | None]) -> int | None:
    """Bytes asked for beyond what there was; None where the error does not say what was asked for."""
    text = str(error)
    tried = _TRIED.search(text)
    if tried is None:
        return None
    free = _FREE.search(text)
    left = _bytes(free) if free is not None else available()
    return None if left is None or left >= _bytes(tried) else _bytes(tried) - left


def one_line(error: BaseException) -> str:
    """Type and first line of the message; our own errors are a line already."""
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError | EnvironmentProblem | DataError | RewardError):
        return text
    return f"{_name(error)}: {text[:400]}" if text else _name(error)


def log_of(error: BaseException) -> str:
    """The traceback, for the trial's log."""
    return "".join(traceback.format_exception(error))


def _name(error: BaseException) -> str:
    return type(error).__name__


def _bytes(found: re.Match[str]) -> int:
    return round(float(found[1]) * _UNITS[found[2]])
